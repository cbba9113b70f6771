import pytest

from unimoe.compare.config import CompareConfig, DataConfig, FromScratch

PROSE = "The quick brown fox jumps over the lazy dog, again and again. " * 12
NUMBERS = " ".join(str(number) for number in range(300))


@pytest.fixture
def texts(tmp_path):
    """A folder with two text files."""
    (tmp_path / "prose.txt").write_text(PROSE)
    (tmp_path / "numbers.txt").write_text(NUMBERS)
    return tmp_path


@pytest.fixture
def small(texts):
    """Makes a comparison from scratch that takes seconds, with some settings changed."""

    def make(**changed) -> CompareConfig:
        files = {name: str(texts / f"{name}.txt") for name in ("prose", "numbers")}
        data = DataConfig(
            train=changed.pop("train", {files["prose"]: 0.5, files["numbers"]: 0.5}),
            val=[files["prose"]],
            test={"digits": files["numbers"]},
            eval_samples=2,
            length=16,
        )
        settings = {
            "data": data,
            "designs": [],
            "from_scratch": FromScratch(layers=2, width=32, ffn=192, heads=2),
            "placement": "all",
            "steps": 2,
            "batch_size": 2,
            "seeds": [0],
            "output": str(texts / "out"),
        }
        return CompareConfig(**{**settings, **changed})

    return make
