"""Answers that share a prompt are learned exactly as in rows of their own."""

from dataclasses import replace
from itertools import takewhile

import pytest
import torch
from architectures import tiny_model
from conftest import small_llama
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from transformers.trainer_pt_utils import LengthGroupedSampler

from toolweaver_hf.alignment.rows import retrieval_rows, share_prompts, tokenize_rows
from toolweaver_hf.alignment.trainer import (
    AlignmentTrainer,
    AlignmentTrainingArguments,
    SharedPromptCollator,
    ShuffledBatchSampler,
)
from toolweaver_hf.cache import can_share_prompts
from toolweaver_hf.data.queries import Query


COLLATOR = SharedPromptCollator(pad_token_id=0)


def loss_and_gradient(model, batch):
    labels = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return loss.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*model.parameters()])])


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.lists(st.integers(1, 4), min_size=1, max_size=4)), min_size=1, max_size=5
    ),
    st.integers(0, 6),
    st.sampled_from([0, 12, 40, 512]),
)
def test_loss_and_gradient_are_those_of_separate_rows(shapes, num_shared, max_packed_length):
    """Prompts of any length, which begin alike or not, each with any number of answers; padded, or side by side."""
    generator = torch.Generator().manual_seed(0)
    system = torch.randint(3, 50, (num_shared,), generator=generator).tolist()
    rows = []
    for i, (length, answers) in enumerate(shapes):
        prompt = system + torch.randint(3, 50, (length,), generator=generator).tolist()
        prompt_length = len(prompt)
        for length in answers:
            answer = torch.randint(50, 60, (length,), generator=generator).tolist()
            rows.append({"id": f"q{i}", "input_ids": prompt + answer, "labels": [-100] * prompt_length + answer})
    dataset = Dataset.from_list(rows)
    shared = share_prompts(dataset)
    assert len(shared) <= len(shapes)
    assert sum(map(len, shared["input_ids"])) <= sum(map(len, dataset["input_ids"]))
    model = small_llama(60)
    batch = replace(COLLATOR, max_packed_length=max_packed_length)([dict(row) for row in shared])
    lengths = [len(ids) for ids in shared["input_ids"]]
    tokens = sum(lengths) - (len(shared) - 1) * max(num_shared - 1, 0)
    if max_packed_length == 512 and tokens < len(shared) * max(lengths):  # else nothing is saved
        assert len(batch["input_ids"]) == 1
        assert batch["input_ids"].shape[1] <= tokens
    loss, gradient = loss_and_gradient(model, batch)
    apart = [loss_and_gradient(model, COLLATOR([dict(row)])) for row in dataset]
    torch.testing.assert_close(loss, sum(loss for loss, _ in apart), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, sum(gradient for _, gradient in apart), rtol=1e-3, atol=1e-3)


def test_a_query_is_read_once(tokenizer):
    queries = [Query("both", "Shall I take a coat?", ("rain", "wind")), Query("one", "Euros in dollars?", ("fx",))]
    dataset, _ = tokenize_rows(retrieval_rows(queries, tokenizer), tokenizer)
    shared = share_prompts(dataset)
    assert shared["id"] == ["both", "one"]
    learned = [[label for label in row if label != -100] for row in shared["labels"]]
    rain, wind, fx = (tokenizer.encode_tool(tool) for tool in ("rain", "wind", "fx"))
    end = tokenizer.eos_token_id
    assert learned == [[*rain, *wind, end, *wind], [*fx, end]]
    assert shared[1]["input_ids"] == dataset[2]["input_ids"]


def test_the_trainer_learns_them_and_counts_their_tokens(tokenizer, tmp_path):
    queries = [
        Query("both", "Shall I take a coat?", ("rain", "wind")),
        Query("one", "Euros in dollars?", ("fx",)),
        Query("three", "Is there mail about the storm that comes up tonight?", ("mail", "wind", "rain")),
    ]
    apart = tokenize_rows(retrieval_rows(queries, tokenizer), tokenizer)[0]
    dataset = share_prompts(apart)
    args = AlignmentTrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=3,
        max_length=None,
        bf16=False,
        activation_checkpointing=False,
        report_to="none",
    )
    trainer = AlignmentTrainer(
        model=small_llama(len(tokenizer)), args=args, train_dataset=dataset, processing_class=tokenizer
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["attention_mask"].ndim == 4
    model = trainer.model.train()
    loss = trainer.compute_loss(model, dict(batch))
    counted = trainer._metrics["train"]["num_tokens"]
    torch.testing.assert_close(loss, trainer.compute_loss(model, COLLATOR([dict(row) for row in apart])))
    # What all three begin with is read once.
    begin = len(takewhile_alike(dataset["input_ids"]))
    assert counted == [sum(map(len, dataset["input_ids"])) - 2 * begin] and begin > 2
    assert sorted(trainer._row_ids(batch)) == ["both", "one", "three"]
    one = trainer.data_collator([dict(dataset[1])])
    assert trainer._row_ids(one) == ["one"] and len(next(iter(trainer.get_eval_dataloader(dataset)))["labels"]) == 3


def takewhile_alike(rows):
    return [tokens[0] for tokens in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*rows, strict=False))]


@pytest.mark.parametrize(
    ("model", "can"),
    [
        (small_llama(60), True),
        (tiny_model("qwen3", 60), True),
        (small_llama(60, attn_implementation="eager"), False),
        (tiny_model("gpt2", 60), False),
        (tiny_model("mamba", 60), False),
        (tiny_model("mistral", 60), False),
        (tiny_model("phi3", 60), False),
        (tiny_model("gemma3_text", 60), False),
        (tiny_model("mixtral", 60), False),
        (tiny_model("qwen3_moe", 60), False),
    ],
    ids=["llama", "qwen3", "eager", "gpt2", "mamba", "mistral", "phi3", "gemma3", "mixtral", "qwen3_moe"],
)
def test_only_models_that_a_mask_rules_share_prompts(model, can):
    """Neither positions of their own, states, sliding windows nor mixtures of experts."""
    assert can_share_prompts(model) is can


@settings(deadline=None)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=200), st.integers(1, 9), st.integers(0, 5))
def test_batches_of_like_length_come_in_random_order(lengths, batch_size, seed):
    grouped = LengthGroupedSampler(batch_size, lengths=lengths)
    sampler = ShuffledBatchSampler(grouped, batch_size, lambda: seed)
    order = list(sampler)
    assert sorted(order) == list(range(len(lengths))) and order == list(sampler)
    assert lengths[order[0]] == max(lengths)
    grouped.generator = torch.Generator().manual_seed(seed)
    expected = list(grouped)
    batches = {tuple(expected[i : i + batch_size]) for i in range(0, len(expected), batch_size)}
    assert {tuple(order[i : i + batch_size]) for i in range(0, len(order), batch_size)} == batches


def test_lengths_do_not_fall_in_the_course_of_an_epoch():
    lengths = list(range(800))
    order = list(ShuffledBatchSampler(LengthGroupedSampler(4, lengths=lengths), 4, lambda: 0))
    quarters = [sum(order[i : i + 100]) / 100 for i in range(0, 800, 100)]
    assert max(quarters) - min(quarters) < 250  # sorted, 600
