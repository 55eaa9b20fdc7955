import json

import pytest
import torch

from toolweaver_hf import RQVAEConfig, RQVAEModel, Tool, ToolCatalog, ToolCodes


def test_round_trip(tmp_path, codes):
    codes.remove("fx")
    codes.save_pretrained(tmp_path)
    again = ToolCodes.from_pretrained(tmp_path)
    assert dict(again) == {"rain": (0, 0), "wind": (0, 1), "mail": (1, 1)}
    assert again.retired == {(2, 3)}
    assert again.codebook_sizes == [3, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["tool_codes.json"]


def test_compare():
    rain, wind = Tool("rain", "Rain in a city."), Tool("wind", "Wind in a city.")
    codes = ToolCodes([2, 2], {"rain": [0, 0], "wind": [0, 1]}, {tool.id: tool.checksum for tool in (rain, wind)})
    changes = codes.compare(ToolCatalog([Tool("rain", "Will it rain?"), Tool("snow", "Snow in a city.")]))
    assert changes == (["snow"], ["wind"], ["rain"])


@pytest.mark.parametrize(
    ("new", "says"),
    [
        ({"fx": [0, 1]}, "'wind'"),
        ({"fx": [3, 0]}, "'fx'"),
        ({"fx": [0]}, "'fx'"),
        ({"fx": [-1, 0]}, "'fx'"),
    ],
)
def test_wrong_codes_name_the_tool(new, says):
    with pytest.raises(ValueError, match=says):
        ToolCodes([3, 4], {"rain": [0, 0], "wind": [0, 1]} | new)


def test_remove_is_all_or_nothing(codes):
    with pytest.raises(ValueError, match="'snow'"):
        codes.remove("rain", "snow")
    assert "rain" in codes


def test_broken_file_is_named(tmp_path):
    path = tmp_path / "tool_codes.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"tool_codes\.json is not valid JSON"):
        ToolCodes.from_pretrained(tmp_path)
    path.write_text(json.dumps({"schema_version": 99, "codebook_sizes": [2], "codes": {}}))
    with pytest.raises(ValueError, match=r"tool_codes\.json"):
        ToolCodes.from_pretrained(tmp_path)


def test_add_touches_no_old_code_and_reuses_no_retired_one(codes):
    model = RQVAEModel(RQVAEConfig(input_dim=8, codebook_sizes=[3, 4]))
    codes.remove("fx")
    before = dict(codes)
    new = [Tool(f"new{i}", f"New tool {i}.") for i in range(8)]
    codes.add(new, model, torch.randn(8, 8))
    assert {tool_id: codes[tool_id] for tool_id in before} == before
    assert len(set(codes.values()) | {(2, 3)}) == 12  # all of 3 x 4, the retired one still free
    assert codes.compare(ToolCatalog([*new, Tool("rain", "Rain.")])).changed == []
    with pytest.raises(ValueError, match="12 codes"):
        codes.add([Tool("one_more", "One more.")], model, torch.randn(1, 8))
    with pytest.raises(ValueError, match="'new0' already has a code"):
        codes.add(new[:1], model, torch.randn(1, 8))
    assert "one_more" not in codes


def test_retired_codes_are_reused_when_asked():
    codes = ToolCodes([2, 2], {"rain": [0, 0], "wind": [0, 1], "fx": [1, 0], "mail": [1, 1]})
    model = RQVAEModel(RQVAEConfig(input_dim=8, codebook_sizes=[2, 2]))
    codes.remove("fx")
    new = [Tool("new", "A new tool.")]
    with pytest.raises(ValueError, match="5 tools do not fit"):
        codes.add([*new, Tool("other", "Another.")], model, torch.randn(2, 8), reuse_retired=True)
    with pytest.raises(ValueError, match="fit"):
        codes.add(new, model, torch.randn(1, 8))
    codes.add(new, model, torch.randn(1, 8), reuse_retired=True)
    assert codes["new"] == (1, 0) and not codes.retired


def test_add_names_the_tool_without_an_embedding():
    codes = ToolCodes([2, 2], {"rain": [0, 0]})
    model = RQVAEModel(RQVAEConfig(input_dim=8, codebook_sizes=[2, 2]))
    embeddings = torch.randn(2, 8)
    embeddings[1, 3] = torch.nan
    with pytest.raises(ValueError, match="'snow' holds NaN"):
        codes.add([Tool("fx", "Rates."), Tool("snow", "Snow.")], model, embeddings)
    assert list(codes) == ["rain"]
