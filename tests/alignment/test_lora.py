"""What LoRA trains of models whose modules have names or embeddings of their own kind."""

import pytest
import torch
from architectures import tiny_model
from peft import LoraConfig, get_peft_model

from toolweaver_hf.adapter import keep_embedding, make_room
from toolweaver_hf.alignment.lora import check_shared_weights, linear_layers, trainable_code_rows


IDS = torch.arange(5, 25)[None]


@pytest.mark.parametrize("model_type", ["llama", "fuyu", "inkling_text"])
def test_the_rows_of_the_code_tokens_alone_are_trained(tokenizer, model_type):
    """Fuyu has `vision_embed_tokens` beside `embed_tokens`, and Inkling's embeddings end in a norm."""
    model = tiny_model(model_type, len(tokenizer))
    make_room(model, len(tokenizer))
    with torch.no_grad():
        expected = model(input_ids=IDS, use_cache=False).logits
    rows = trainable_code_rows(model, tokenizer)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=linear_layers(model), trainable_token_indices=rows)
    model = get_peft_model(model, config).eval()
    keep_embedding(model)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad and "lora_" not in name}
    assert len(trained) == len(rows) and all("trainable_tokens_delta" in name for name in trained)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS, use_cache=False).logits, expected)
        merged = model.merge_and_unload()(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(merged, expected)


@pytest.mark.parametrize("model_type", ["zamba", "zamba2"])
def test_layers_that_share_a_weight_get_no_adapter(tokenizer, model_type):
    """Merging would add to the one weight what each of them learned."""
    model = tiny_model(model_type, len(tokenizer))
    layers = linear_layers(model)
    assert layers and not any("shared_transf" in layer for layer in layers)
    check_shared_weights(get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=layers)))

    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    model = get_peft_model(tiny_model(model_type, len(tokenizer)), config)
    with pytest.raises(ValueError, match="share a weight"):
        check_shared_weights(model)


def test_a_head_that_peft_cannot_tell_from_other_modules_is_refused(tokenizer):
    with pytest.raises(ValueError, match="train it without --use_peft"):
        trainable_code_rows(tiny_model("git", len(tokenizer)), tokenizer)
