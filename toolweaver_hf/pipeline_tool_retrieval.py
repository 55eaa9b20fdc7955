"""The `transformers` pipeline `tool-retrieval`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils import logging

from .retrieval import ToolRetriever
from .text_expert import TextExpert


logger = logging.get_logger(__name__)


class ToolRetrievalPipeline(Pipeline):
    r"""
    Ranks tools for queries with an aligned model; [`ToolRetriever`] as a [`Pipeline`].

    It takes one query or several, or a dataset or generator of them, and `batch_size` like any pipeline. Called with
    `top_k` (5 where not given), `num_beams` and `allowed_tools` as for the retriever, it returns for each query a list
    of `{"tool_id": ..., "score": ...}`, best first; the score is the tool's log-probability. A text expert beside the
    model guides it.

    Example:

    ```python
    >>> from transformers import pipeline

    >>> retrieve = pipeline("tool-retrieval", model="out/retrieval", trust_remote_code=True)
    >>> retrieve("Is it a good day for the park?", top_k=2)
    [{'tool_id': 'weather', 'score': -0.3}, {'tool_id': 'air_quality', 'score': -1.5}]
    ```
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tokenizer.padding_side = "left"  # as the beams go on at the right
        self.retriever = ToolRetriever(self.model, self.tokenizer, self._load_text_expert())

    def _load_text_expert(self) -> TextExpert | None:
        """The expert beside the model, if there is one."""
        commit = getattr(self.model.config, "_commit_hash", None)  # of a repository, the one that the model is from
        try:
            return TextExpert.from_pretrained(self.model.name_or_path, revision=commit)
        except OSError:
            return None
        except ImportError as error:
            logger.warning(f"The codes alone are ranked, without the text expert: {error}")
            return None

    def _sanitize_parameters(
        self,
        top_k: int | None = None,
        num_beams: int | None = None,
        allowed_tools: Iterable[str] | None = None,
        **unknown: Any,
    ) -> tuple[dict, dict, dict]:
        if unknown:
            raise ValueError(f"the pipeline tool-retrieval takes no {', '.join(unknown)}")
        given = {"top_k": top_k, "num_beams": num_beams, "allowed_tools": allowed_tools}
        return {}, {name: value for name, value in given.items() if value is not None}, {}

    def preprocess(self, query: str) -> dict[str, torch.LongTensor]:
        ids = torch.tensor([self.retriever.encode_query(query)])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.retriever.text_expert is not None:
            inputs["expert_logits"] = self.retriever.text_expert.logits([query])
        return inputs

    def _forward(self, model_inputs: dict[str, torch.Tensor], **parameters: Any) -> dict[str, torch.Tensor]:
        tools, scores = self.retriever.rank(**model_inputs, **parameters)
        return {"tools": tools, "scores": scores}

    def postprocess(self, model_outputs: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
        (found,) = self.retriever.name_tools(model_outputs["tools"].view(1, -1), model_outputs["scores"].view(1, -1))
        return [tool._asdict() for tool in found]


if "tool-retrieval" not in PIPELINE_REGISTRY.get_supported_tasks():
    PIPELINE_REGISTRY.register_pipeline(
        "tool-retrieval", pipeline_class=ToolRetrievalPipeline, pt_model=AutoModelForCausalLM, type="text"
    )
