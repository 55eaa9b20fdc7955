"""`toolweaver_hf.embeddings.embed_catalog`, the path that earlier code imports it by. It is `toolweaver_hf.embed_catalog`."""

from .codes.embeddings import embed_catalog as embed_catalog
