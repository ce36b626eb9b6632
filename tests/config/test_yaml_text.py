"""What is said about a YAML file that is not what its author meant, each time in one line with its place."""

from pathlib import Path

import pytest

from speedit_plugins.trainer.config.loading import load_config

PLAIN = """experiment_dir: o
model: {type: DiT}
max_training_steps: 3
data: {dataset: {type: Digits}, batch_size: 4}
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{PLAIN}optimizer:\n\tlr: 1e-3\n", "line 6: not valid YAML: a tab; YAML is indented with blanks"),
        (f"{PLAIN}seed: 1\nseed: 2\n", "line 6: not valid YAML: found duplicate key seed"),
        (f"{PLAIN}seed:3\n", "a key needs a blank after its colon"),
        (f"{PLAIN}seed: 010\n", "line 5: YAML reads 010 as the number 8; wanted that number, or quotes"),
        (f"{PLAIN}sample_prompts:\n- 1:30\n", "line 6: YAML reads 1:30 as the number 90"),
        (f"{PLAIN}on: 4\n", "line 5: YAML reads the key 'on' as a truth value; wanted a name"),
        (f"{PLAIN}null: 4\n", "line 5: YAML reads the key 'null' as null; wanted a name"),
        (f"{PLAIN}? [a, b]\n: 4\n", "line 5: wanted a name as the key, got a list or a section"),
        (f"{PLAIN}---\nseed: 1\n", "line 5: not valid YAML: a second document begins here (---); wanted one"),
        ("- a\n- b\n", "line 1: wanted keys at the top level, got a list"),
        ("# words\nhello\n", "line 2: wanted keys at the top level, got a single text without a key"),
        ("# nothing\n", "which has no keys)"),
        ("", "which has no keys)"),
        (PLAIN.encode("utf-16"), "wanted text in UTF-8, which byte 0 is no part of"),
        (f"{PLAIN}experiment_name: caf".encode() + b"\xe9\n", "wanted text in UTF-8, which byte"),
        (f"{PLAIN}seed: !!python/object/apply:os.getcwd []\n", "line 5: not valid YAML: could not determine"),
        (f"{PLAIN}optimizer:\n", "optimizer: wanted a section with keys, got None; leave the key out"),
        (f"{PLAIN}experiment_name: ${{oc.env:NOPE_X}}\n", "Environment variable 'NOPE_X' not found"),
    ],
)
def test_a_fault_of_the_file_is_told_with_its_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    file = tmp_path / "leaf.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=".") as caught:
        load_config(file, "train")
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("optimizer: {lr: 1e-4}", "optimizer.lr", 1e-4),
        ("compile: yes", "compile", True),
        ("compile: off", "compile", False),
        ("seed: 1_000", "seed", 1000),
        ("seed: 1e3", "seed", 1000),
        ("experiment_name: '010'", "experiment_name", "010"),
        ("experiment_name: 2024-01-02", "experiment_name", "2024-01-02"),
    ],
)
def test_usual_ways_to_write_a_value_are_read(tmp_path: Path, line: str, key: str, value: object) -> None:
    file = tmp_path / "leaf.yaml"
    # Some editors begin a file with a byte order mark.
    file.write_text(f"\ufeff{PLAIN}{line}\n", encoding="utf-8")
    found: object = load_config(file, "train")
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_the_command_line_is_read_with_the_same_care() -> None:
    with pytest.raises(ValueError, match=r"^seed: YAML reads 010 as the number 8.*\(in command line\)$"):
        load_config("image/digits/speedit.yaml", "train", ["seed=010"])
