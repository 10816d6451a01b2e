"""The README's Python runs as it stands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def test_there_is_something_to_run():
    assert len(BLOCKS) >= 4


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_blocks_run(number):
    code = BLOCKS[number]
    if "from_pretrained(" in code:
        # needs a checkpoint from a hub; its calls of ours are those of the others
        compile(code, "README.md", "exec")
        return
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    if "video" in names:
        assert names["video"].shape == (1, 17, 128, 128, 3)
    if "report" in names:
        assert 0.15 <= names["report"].density < 0.25, "text is exact"
