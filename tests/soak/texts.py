"""What is asked: real documents, as tokens."""

from __future__ import annotations

from pathlib import Path

from keepkv_sglang.tools.evaluate.documents import documents
from keepkv_sglang.tools.places import REPO, data_folder

DOCUMENTS, TOKENS = 20, 2000


def load(model_path: Path) -> list[list[int]]:
    """Documents of TOKENS tokens each: the shared data's, or where there is no such folder this project's own pages."""
    from transformers import AutoTokenizer  # start-up cost

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    try:
        folder = data_folder(holds="mt_bench")
    except ValueError:
        pages = "\n".join(path.read_text() for path in sorted((REPO / "docs").glob("*.md")))
        ids = tokenizer.encode(pages)
        return [ids[at : at + TOKENS] for at in range(0, len(ids) - TOKENS, TOKENS)][:DOCUMENTS]
    made = documents(lambda text: tokenizer.encode(text, add_special_tokens=False), folder, DOCUMENTS, TOKENS - 1, 1)
    return [document.prompt + document.following for document in made]
