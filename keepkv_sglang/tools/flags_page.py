"""docs/flags.md, from the options themselves: `python -m keepkv_sglang.tools.flags_page` writes it."""

from __future__ import annotations

from keepkv_sglang.settings.config import OPTIONS
from keepkv_sglang.start.flags import flag_name, shown_default
from keepkv_sglang.tools.places import REPO
from keepkv_sglang.tools.report import tables

PAGE = REPO / "docs" / "flags.md"
HEAD = """# Flags and request keys

`python -m keepkv_sglang.tools.flags_page` makes it from `keepkv_sglang/settings/config.py`. A test fails when it is
stale.

A flag is given to `launch_server` and `sglang serve`; `sgl.Engine` takes it as a keyword (`--keepkv-budget 0.1` is
`keepkv_budget=0.1`). A request key goes into `custom_params` of the sampling parameters:
`{"custom_params": {"keepkv": {"budget": 0.1}}}`. Numbers in requests are JSON numbers.

The last column says how far a request may move away from the server's value. `--keepkv-request-keys` opens a key.
"""


def page() -> str:
    """The whole of docs/flags.md."""
    rows, details = [], []
    for name, option in OPTIONS.items():
        flag = "--" + flag_name(name).replace("_", "-")
        key = "the server's only" if option.server else f"`{name}`"
        if option.bound is not None:
            key += f": {option.bound.text}"
        elif not option.server:
            key += ": false only" if name == "enabled" else ": any value"
        rows.append((f"`{flag}`", shown_default(name), option.unit or "-", key))
        details.append(f"- `{flag}`: {option.help}")
    table = tables.markdown(("flag", "default", "unit", "request key"), rows, padded=False)
    return "\n".join([HEAD, table, "", "## What each does", "", *details, ""])


def main() -> None:
    """Writes the page."""
    PAGE.write_text(page())
    print(PAGE)


if __name__ == "__main__":
    main()
