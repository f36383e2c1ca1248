"""The task classes: `PeftModel` with the forward of one kind of transformers model, and the modules its head needs."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from funcadapt.peft.config import PeftConfig
from funcadapt.peft.model import PeftModel


class _TaskModel(PeftModel):
    """What the task classes share: the head is trained and saved, and the model is called by keywords."""

    head_names: ClassVar[tuple[str, ...]] = ()
    fills_return_dict: ClassVar[bool] = False

    def __init__(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", **kwargs: Any) -> None:
        self._save_head(peft_config)
        super().__init__(model, peft_config, adapter_name, **kwargs)

    def _save_head(self, config: Any) -> None:
        """Add the head's names to `modules_to_save`, in place, as PEFT does; a name that is there stays once."""
        if self.head_names and hasattr(config, "modules_to_save"):
            config.modules_to_save = list(dict.fromkeys((*(config.modules_to_save or ()), *self.head_names)))

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> None:
        """Inject one more adapter, with a copy of the head of its own, see `PeftModel.add_adapter`.

        Args:
            adapter_name: its name.
            peft_config: its config.
            *args: as of `PeftModel.add_adapter`.
            **kwargs: as of `PeftModel.add_adapter`.
        """
        self._save_head(peft_config)
        super().add_adapter(adapter_name, peft_config, *args, **kwargs)

    def _call(self, named: dict[str, Any], kwargs: dict[str, Any], task_ids: Any = None) -> Any:
        if task_ids is not None and "task_ids" in self.base_model.call_inputs:
            kwargs = {**kwargs, "task_ids": task_ids}
        config: Any = getattr(self.base_model, "config", None)
        if self.fills_return_dict and named["return_dict"] is None:
            named["return_dict"] = getattr(config, "return_dict", True) and not getattr(config, "torchscript", False)
        if getattr(config, "model_type", None) == "mpt" and named["inputs_embeds"] is None:
            del named["inputs_embeds"]  # older ones have no such argument
        with self._enable_peft_forward_hooks(**named, **kwargs):
            return self.base_model(**named, **self._without_special(kwargs))


class _LabelledModel(_TaskModel):
    """What the models share whose loss takes `labels`, and that have no inputs of a decoder."""

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        task_ids: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The model's output. `task_ids` is for Poly, and dropped for other methods, as in PEFT."""
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
        }
        return self._call(named, kwargs, task_ids)


class _ClassifyingModel(_LabelledModel):
    """What the models that classify share."""

    head_names = ("classifier", "score")
    fills_return_dict = True


class PeftModelForSequenceClassification(_ClassifyingModel):
    """A `PeftModel` whose model classifies sequences; its `classifier` or `score` is trained and saved in full."""


class PeftModelForTokenClassification(_ClassifyingModel):
    """A `PeftModel` whose model classifies tokens; its `classifier` or `score` is trained and saved in full.

    The head's names are added before the adapter is injected, not after as in PEFT: a head that `target_modules`
    matches is trained in full, where PEFT wraps its LoRA layer and raises.
    """


class PeftModelForQuestionAnswering(_TaskModel):
    """A `PeftModel` whose model answers questions by spans; its `qa_outputs` is trained and saved in full."""

    head_names = ("qa_outputs",)
    fills_return_dict = True

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        start_positions: Any = None,
        end_positions: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        task_ids: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The model's output. `token_type_ids` and `position_ids` reach the model; PEFT drops them without a word."""
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "start_positions": start_positions,
            "end_positions": end_positions,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
        }
        ids = {"token_type_ids": token_type_ids, "position_ids": position_ids}
        given = {name: value for name, value in ids.items() if value is not None}
        return self._call(named | given, kwargs, task_ids)


class PeftModelForFeatureExtraction(_TaskModel):
    """A `PeftModel` whose model gives features."""

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        task_ids: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The model's output. `task_ids` is for Poly, and dropped for other methods."""
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
        }
        return self._call(named, kwargs, task_ids)


class _GeneratingModel(_TaskModel):
    """What the models that generate text share."""

    def __init__(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", **kwargs: Any) -> None:
        super().__init__(model, peft_config, adapter_name, **kwargs)
        self.base_model_prepare_inputs_for_generation = self.base_model.prepare_inputs_for_generation

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's `generate`; `adapter_names` as in `forward`, repeated for beams and returned sequences."""
        model: Any = self.get_base_model()
        model.generation_config = self.generation_config  # somebody may have set another one on the wrapper
        return self._generate(self.base_model, *args, **kwargs)


class PeftModelForCausalLM(_GeneratingModel, _LabelledModel):
    """A `PeftModel` whose model continues text."""

    def prepare_inputs_for_generation(self, *args: Any, task_ids: Any = None, **kwargs: Any) -> Any:
        """The model's inputs for its next step, without `cache_position`, as PEFT gives them."""
        inputs = self.base_model_prepare_inputs_for_generation(*args, **kwargs)
        inputs.pop("cache_position", None)
        return inputs


class PeftModelForSeq2SeqLM(_GeneratingModel):
    """A `PeftModel` whose model turns text into text."""

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        decoder_input_ids: Any = None,
        decoder_attention_mask: Any = None,
        decoder_inputs_embeds: Any = None,
        labels: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        task_ids: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The model's output. `task_ids` is for Poly, and dropped for other methods."""
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
            "decoder_inputs_embeds": decoder_inputs_embeds,
            "labels": labels,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
        }
        return self._call(named, kwargs, task_ids)

    def prepare_inputs_for_generation(self, *args: Any, task_ids: Any = None, **kwargs: Any) -> Any:
        """The model's inputs for its next step."""
        return self.base_model_prepare_inputs_for_generation(*args, **kwargs)


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {
    "SEQ_CLS": PeftModelForSequenceClassification,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "CAUSAL_LM": PeftModelForCausalLM,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
}
