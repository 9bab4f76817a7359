"""A real tokenizer and chat template pass the preflight of prompt and answer without a caution."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.base import ModelFiles
from pipeline.records import Prompt
from teachers.preflight.boundary import check_boundaries
from teachers.tokenizing import answer_ids, load_tokenizer, prompt_ids
from tests.support.real_model import EXAMPLE


def test_real_questions_and_references_meet_as_the_template_writes_them(
    real_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer: Any = load_tokenizer(ModelFiles(str(real_model)))
    lines = (EXAMPLE / "prompts/gsm8k_holdout.jsonl").read_text().splitlines()
    prompts = [
        Prompt(f"p{i}", "d", "train", tuple(row["messages"]), reference=row["reference"])
        for i, row in enumerate(map(json.loads, lines))
    ]
    check_boundaries(tokenizer, prompts, prompts)
    assert prompts and not caplog.records
    for prompt in prompts:
        ids, reference = prompt_ids(tokenizer, prompt), str(prompt.reference)
        ours = ids + answer_ids(tokenizer, prompt, ids, reference)
        messages = [*(prompt.messages or ()), {"role": "assistant", "content": reference}]
        own = tokenizer.apply_chat_template(messages, return_dict=False)
        assert own[: len(ours)] == ours and own[len(ours)] == tokenizer.eos_token_id
