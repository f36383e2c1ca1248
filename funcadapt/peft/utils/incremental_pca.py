"""PEFT's place of `IncrementalPCA`."""

from funcadapt.pca import IncrementalPCA as IncrementalPCA
