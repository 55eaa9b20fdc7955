"""Backward compatibility of every file format: old files are read, newer ones are refused by name."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from toolweaver_hf import RQVAEModel, ToolCatalog, ToolCodes
from toolweaver_hf.alignment.record import TRAINING_VERSION
from toolweaver_hf.codes.measures import CODES_METRICS_VERSION
from toolweaver_hf.codes.report import inspect_codes
from toolweaver_hf.data.queries import load_queries
from toolweaver_hf.data.trajectories import load_trajectories
from toolweaver_hf.evaluation.rankings import RANKING_METRICS_VERSION as EVALUATION_VERSION
from toolweaver_hf.files import read_json
from toolweaver_hf.hub.cards import create_card


GOLDEN = Path(__file__).parent / "fixtures" / "golden"

# Every JSON of ours, with its newest schema_version. Rows of JSONL are the user's, in formats that others read as well.
FORMATS = {
    "codes/tool_codes.json": 1,
    "codes/metrics.json": CODES_METRICS_VERSION,
    "codes/report.json": CODES_METRICS_VERSION,
    "model/training.json": TRAINING_VERSION,
    "model/evaluation/metrics.json": EVALUATION_VERSION,
}


def test_codes_folder(tmp_path):
    codes = ToolCodes.from_pretrained(GOLDEN / "codes")
    assert dict(codes) == {"rain": (0, 1), "wind": (1, 0), "fx": (1, 1)}
    assert codes.retired == {(0, 0)}
    assert codes.checksums == {tool.id: tool.checksum for tool in ToolCatalog.from_pretrained(GOLDEN / "codes")}
    model = RQVAEModel.from_pretrained(GOLDEN / "codes")
    assert model.config.codebook_sizes == [2, 2]
    embeddings = load_file(GOLDEN / "codes" / "embeddings.safetensors")["embeddings"]
    assert embeddings.shape == (3, 4)
    shutil.copytree(GOLDEN / "codes", tmp_path / "codes")
    assert inspect_codes(tmp_path / "codes").exists()
    assert read_json(tmp_path / "codes/report.json", CODES_METRICS_VERSION)["schema_version"] == CODES_METRICS_VERSION


def test_card_of_a_model():
    card = create_card(GOLDEN / "model", "me/model")
    assert card.data.base_model == "someone/base"
    assert {result.metric_name for result in card.data.eval_results} >= {"nDCG@1", "R@5", "COMP@3"}


def test_rows():
    assert load_queries(GOLDEN / "queries.jsonl")[0].tools == ("rain", "wind")
    (row,) = load_trajectories(GOLDEN / "trajectories.jsonl")
    assert row["messages"][1]["tool_calls"][0]["function"] == {"name": "rain", "arguments": {"city": "Oslo"}}


@pytest.mark.parametrize(("name", "version"), FORMATS.items())
def test_versions(tmp_path, name, version):
    """A file without a version, or of an older one, is read; one of a newer version is refused by its name."""
    shutil.copytree(GOLDEN, tmp_path / "golden")
    path = tmp_path / "golden" / name

    def load():
        if path.name == "tool_codes.json":
            ToolCodes.from_pretrained(path.parent)
        elif name.startswith("model"):
            create_card(tmp_path / "golden/model", "me/model")
        elif path.name == "metrics.json":
            inspect_codes(path.parent)
        else:
            read_json(path, version)

    document = json.loads(path.read_text())
    assert document["schema_version"] == 1
    for older in range(version + 1):
        path.write_text(json.dumps(document | {"schema_version": older}))
        load()
    path.write_text(json.dumps(document | {"schema_version": version + 1}))
    with pytest.raises(ValueError, match=rf"{path.name} has schema_version {version + 1}, newer than {version}"):
        load()
