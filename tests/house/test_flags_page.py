"""docs/flags.md says what the options say."""

from __future__ import annotations

from keepkv_sglang.settings.config import OPTIONS
from keepkv_sglang.start.flags import flag_name
from keepkv_sglang.tools.flags_page import PAGE, page


def test_the_page_is_not_stale():
    assert PAGE.read_text() == page(), "run: python -m keepkv_sglang.tools.flags_page"


def test_every_flag_is_in_the_table_and_explained():
    text = page()
    for name in OPTIONS:
        flag = "--" + flag_name(name).replace("_", "-")
        assert f"| `{flag}` |" in text and f"- `{flag}`:" in text
