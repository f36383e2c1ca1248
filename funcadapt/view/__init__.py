"""The in-place view: adapters as PEFT's modules inside a live model."""

from funcadapt.view.inject import inject as inject
from funcadapt.view.inject import materialize as materialize
from funcadapt.view.values import adapter_of as adapter_of
from funcadapt.view.values import dematerialize as dematerialize
from funcadapt.view.walking import unwrapped as unwrapped
