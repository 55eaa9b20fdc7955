"""Hierarchical tool codes for large language models (ToolWeaver, arXiv 2601.21947)."""

from importlib.metadata import version

from transformers import AutoConfig, AutoModel, AutoTokenizer

from .agent.arguments import ToolArgumentsLogitsProcessor
from .agent.loop import ToolAgent
from .agent.mcp import MCPTools
from .agent.run import AgentRun, save_trajectories
from .codes.tool_codes import ToolCodes
from .configuration_rqvae import RQVAEConfig
from .data.catalog import Tool, ToolCatalog
from .logits_process import ToolCodeLogitsProcessor
from .modeling_rqvae import RQVAEModel
from .pipeline_tool_retrieval import ToolRetrievalPipeline
from .retrieval import RetrievedTool, ToolRetriever
from .tokenization_toolweaver import ToolWeaverTokenizer
from .trie import CodeTrie


__version__ = version("toolweaver-hf")

__all__ = [
    "AgentRun",
    "CodeTrie",
    "MCPTools",
    "RQVAEConfig",
    "RQVAEModel",
    "RetrievedTool",
    "Tool",
    "ToolAgent",
    "ToolArgumentsLogitsProcessor",
    "ToolCatalog",
    "ToolCodeLogitsProcessor",
    "ToolCodes",
    "ToolRetrievalPipeline",
    "ToolRetriever",
    "ToolWeaverTokenizer",
    "save_trajectories",
]

# With the package installed, the Auto classes load its models without trust_remote_code.
AutoConfig.register(RQVAEConfig.model_type, RQVAEConfig)
AutoModel.register(RQVAEConfig, RQVAEModel)
AutoTokenizer.register(RQVAEConfig, fast_tokenizer_class=ToolWeaverTokenizer)
