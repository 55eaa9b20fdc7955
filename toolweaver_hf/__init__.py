"""Hierarchical tool codes for large language models (ToolWeaver, arXiv 2601.21947)."""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .agent.arguments import ToolArgumentsLogitsProcessor
    from .agent.loop import ToolAgent
    from .agent.mcp import MCPTools
    from .agent.run import AgentRun, save_trajectories
    from .codes.embeddings import embed_catalog
    from .codes.tool_codes import ToolCodes
    from .configuration_rqvae import RQVAEConfig
    from .data.catalog import Tool, ToolCatalog
    from .logits_process import ToolCodeLogitsProcessor
    from .modeling_rqvae import RQVAEModel
    from .pipeline_tool_retrieval import ToolRetrievalPipeline
    from .retrieval import RetrievedTool, ToolRetriever
    from .text_expert import TextExpert
    from .tokenization_toolweaver import ToolWeaverTokenizer
    from .trie import CodeTrie


__version__ = "0.1.0"

# As in transformers and TRL, a name is imported when it is first used: `import toolweaver_hf` loads no torch.
_MODULES = {
    "AgentRun": "agent.run",
    "CodeTrie": "trie",
    "MCPTools": "agent.mcp",
    "RQVAEConfig": "configuration_rqvae",
    "RQVAEModel": "modeling_rqvae",
    "RetrievedTool": "retrieval",
    "TextExpert": "text_expert",
    "Tool": "data.catalog",
    "ToolAgent": "agent.loop",
    "ToolArgumentsLogitsProcessor": "agent.arguments",
    "ToolCatalog": "data.catalog",
    "ToolCodeLogitsProcessor": "logits_process",
    "ToolCodes": "codes.tool_codes",
    "ToolRetrievalPipeline": "pipeline_tool_retrieval",
    "ToolRetriever": "retrieval",
    "ToolWeaverTokenizer": "tokenization_toolweaver",
    "embed_catalog": "codes.embeddings",
    "save_trajectories": "agent.run",
}

__all__ = [
    "AgentRun",
    "CodeTrie",
    "MCPTools",
    "RQVAEConfig",
    "RQVAEModel",
    "RetrievedTool",
    "TextExpert",
    "Tool",
    "ToolAgent",
    "ToolArgumentsLogitsProcessor",
    "ToolCatalog",
    "ToolCodeLogitsProcessor",
    "ToolCodes",
    "ToolRetrievalPipeline",
    "ToolRetriever",
    "ToolWeaverTokenizer",
    "embed_catalog",
    "save_trajectories",
]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# With the package imported, the Auto classes load its models without trust_remote_code. Each Auto class learns of them
# when the module that defines it has been loaded, which may be later than this package, or never.
def _register_config(auto) -> None:
    from .configuration_rqvae import RQVAEConfig

    auto.AutoConfig.register(RQVAEConfig.model_type, RQVAEConfig, exist_ok=True)


def _register_model(auto) -> None:
    from .configuration_rqvae import RQVAEConfig
    from .modeling_rqvae import RQVAEModel

    auto.AutoModel.register(RQVAEConfig, RQVAEModel, exist_ok=True)


def _register_tokenizer(auto) -> None:
    from .configuration_rqvae import RQVAEConfig
    from .tokenization_toolweaver import ToolWeaverTokenizer

    auto.AutoTokenizer.register(RQVAEConfig, tokenizer_class=ToolWeaverTokenizer, exist_ok=True)


class _AutoClassFinder(MetaPathFinder):
    """Finds the modules of the Auto classes as Python does, and has the package registered once they are loaded."""

    registrations = {
        "transformers.models.auto.configuration_auto": _register_config,
        "transformers.models.auto.modeling_auto": _register_model,
        "transformers.models.auto.tokenization_auto": _register_tokenizer,
    }

    def find_spec(self, fullname, path, target=None):
        register = self.registrations.get(fullname)
        spec = PathFinder.find_spec(fullname, path, target) if register else None
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module):
                load(module)
                register(module)

            spec.loader.exec_module = load_and_register
        return spec


for _name, _register in _AutoClassFinder.registrations.items():
    if _name in sys.modules:
        _register(sys.modules[_name])
sys.meta_path.insert(0, _AutoClassFinder())
