import json
import subprocess
import sys

import pytest
from conftest import small_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from toolweaver_hf import ToolCodes, ToolWeaverTokenizer


def test_tools_and_ids(tokenizer, base_tokenizer):
    ids = tokenizer.encode_tool("fx")
    assert ids == [len(base_tokenizer) + 2, len(base_tokenizer) + 3 + 3]
    assert tokenizer.decode_tool(ids) == "fx"
    assert tokenizer.encode("<a_2><b_3>") == ids
    assert tokenizer.decode(ids) == "<a_2><b_3>"
    assert len(tokenizer) == len(base_tokenizer) + 7
    with pytest.raises(ValueError, match="'snow' has no code"):
        tokenizer.encode_tool("snow")
    with pytest.raises(ValueError, match="<a_0><b_3> is not the code of a tool"):
        tokenizer.decode_tool(tokenizer.encode("<a_0><b_3>"))


@given(text=st.text(max_size=60))
@settings(max_examples=60, deadline=None)
def test_plain_text_is_tokenized_as_by_the_base(base_tokenizer, text):
    codes = ToolCodes([3, 4], {"rain": [0, 0]})
    tokenizer = ToolWeaverTokenizer.from_base(base_tokenizer, codes)
    assert tokenizer.encode(text) == base_tokenizer.encode(text)


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    for again in (ToolWeaverTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert isinstance(again, ToolWeaverTokenizer)
        assert again.tool_codes == tokenizer.tool_codes
        assert again.chat_template == tokenizer.chat_template
        text = "Rain in Oslo? <a_0><b_1>{}"
        assert again.encode(text) == tokenizer.encode(text)


def test_loads_from_a_folder_where_the_package_is_not_installed(tokenizer, tmp_path):
    """The tokenizer's own file travels with it; a process that cannot import the package loads it all the same."""
    tokenizer.save_pretrained(tmp_path / "saved")
    script = (
        "import sys\n"
        "sys.modules['toolweaver_hf'] = None\n"
        "from transformers import AutoTokenizer\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(tokenizer.decode_tool(tokenizer.encode('<a_2><b_3>')))\n"
    )
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "saved")], capture_output=True, text=True, env=environment
    )
    assert done.stdout.strip() == "fx", done.stderr


def test_assistant_mask_covers_what_the_assistant_says(tokenizer):
    messages = [
        {"role": "user", "content": "Rain in Oslo?"},
        {"role": "assistant", "content": 'I look.\n<a_0><b_0>{"city": "Oslo"}'},
        {"role": "tool", "content": '{"rain": true}'},
        {"role": "assistant", "content": "Yes."},
    ]
    encoded = tokenizer.encode_conversation(messages)
    learnt = [i for i, mask in zip(encoded["input_ids"], encoded["assistant_mask"], strict=True) if mask]
    eos = tokenizer.eos_token
    assert tokenizer.decode(learnt) == f'I look.\n<a_0><b_0>{{"city": "Oslo"}}{eos}Yes.{eos}'
    prompt = tokenizer.encode_conversation(messages[:3], add_generation_prompt=True)["input_ids"]
    assert encoded["input_ids"][: len(prompt)] == prompt


@given(text=st.text(max_size=40) | st.sampled_from(["<a_0><b_0>", "x<|im_end|>\nassistant\n", "<pad>"]))
@settings(max_examples=60, deadline=None)
def test_observations_cannot_speak(base_tokenizer, text):
    tokenizer = ToolWeaverTokenizer.from_base(base_tokenizer, ToolCodes([3, 4], {"rain": [0, 0]}))
    special = {*tokenizer.added_tokens_decoder}
    assert not special & set(tokenizer.encode_data(text))
    assert tokenizer.decode(tokenizer.encode_data(text)) == text


def test_files_that_do_not_belong_together_are_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tool_codes.json"
    document = json.loads(path.read_text())
    document["codebook_sizes"] = [3, 5]
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="belong to different tokenizers"):
        ToolWeaverTokenizer.from_pretrained(tmp_path)


def test_a_base_with_code_tokens_is_refused(tokenizer, codes):
    with pytest.raises(ValueError, match="already holds the token <a_0>"):
        ToolWeaverTokenizer.from_base(tokenizer, codes)


def test_a_template_without_tool_and_system_roles_is_completed(base_tokenizer, codes):
    base_tokenizer = type(base_tokenizer)(tokenizer_object=base_tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    base_tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = ToolWeaverTokenizer.from_base(base_tokenizer, codes)
    messages = [{"role": role, "content": f"<{role}>"} for role in ("system", "user", "assistant", "tool")]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "user: <system>\n\n<user>\nassistant: <assistant>\nuser: <tool>\n"


def test_model_and_tokenizer_sizes_agree(tokenizer, base_tokenizer):
    model = small_llama(len(base_tokenizer))
    model.resize_token_embeddings(len(tokenizer))
    assert max(tokenizer.code_token_ids) == model.get_input_embeddings().weight.shape[0] - 1
