"""A user's own text in place of the Python installation: one subfolder per domain, the older first. Source: ours."""

from pathlib import Path

from datasets import Dataset

from hf_moe_cpt.data.corpus_builder import SIDES, Domain
from hf_moe_cpt.data.corpus_cache import Corpus
from hf_moe_cpt.data.deduplication import content_key
from hf_moe_cpt.data.python_files import stable_fraction
from hf_moe_cpt.data.sources import load_text_dataset


SMALLEST_DOMAIN = 20_000  # characters; less gives no held-out text worth measuring
LONGEST_DOCUMENT = 10_000  # characters; a book in one file must still have train and held-out parts


def load_folder_corpus(data_dir: str | Path, *, held_out_fraction: float = 0.05, seed: int = 0) -> Corpus:
    """Two domains from the two subfolders of a folder: {name: {"train": ..., "held_out": ...}}, the old domain first.

    data_dir: holds exactly two subfolders. They are taken in the order of their names (`1-english`, `2-python`), but
    `old` comes before `new`. Each holds .txt, .jsonl, .parquet or arrow files as `load_text_dataset` reads them.
    held_out_fraction: in (0, 1); a document's own text decides its side. Long ones are cut to pieces first, copies
    and near copies dropped.
    Raises ValueError for a folder that is missing, has other than two subfolders, or holds too little text.
    """
    if not 0.0 < held_out_fraction < 1.0:
        raise ValueError(f"held_out_fraction={held_out_fraction} must lie between 0 and 1: pass for example 0.05.")
    return {folder.name: _load_domain(folder, held_out_fraction, seed) for folder in domain_folders(data_dir)}


def domain_folders(data_dir: str | Path) -> list[Path]:
    """The two subfolders of a user's folder, the old domain first."""
    data_dir = Path(data_dir)
    remedy = "give a folder with two subfolders of text, the older first by name, for example 1-english and 2-python."
    if not data_dir.is_dir():
        raise ValueError(f"data_dir={str(data_dir)!r} is no folder: {remedy}")
    names = sorted(path.name for path in data_dir.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(names) != 2:
        raise ValueError(f"data_dir={str(data_dir)!r} has {len(names)} subfolders ({', '.join(names)}): {remedy}")
    names = ["old", "new"] if set(names) == {"old", "new"} else names
    return [data_dir / name for name in names]


def _load_domain(folder: Path, held_out_fraction: float, seed: int) -> dict[str, Dataset]:
    """One domain, split by the text of its documents so that their order and file names do not matter."""
    dataset = load_text_dataset(str(folder))
    if "text" not in dataset.column_names:
        raise ValueError(f"{str(folder)!r} holds tokens and not text: give the text, the tokenizer is trained on it.")
    pieces = (piece for text in dataset["text"] if text for piece in cut_to_pieces(text, LONGEST_DOCUMENT))
    texts = [piece for piece in pieces if piece.strip()]
    characters = sum(map(len, texts))
    if characters < SMALLEST_DOMAIN:
        raise ValueError(
            f"{str(folder)!r} holds {characters} characters of text and a domain needs {SMALLEST_DOMAIN}: add files."
        )
    texts.sort(key=lambda text: stable_fraction(content_key(text).hex(), seed, "side"))
    num_held_out = max(1, round(held_out_fraction * len(texts)))
    domain = Domain(limits=dict.fromkeys(SIDES, characters))
    for position, text in enumerate(texts):
        domain.add("held_out" if position < num_held_out else "train", folder.name, folder.name, text)
    domain.drop_leaked_documents()
    for side in SIDES:
        if not domain.documents[side]:
            raise ValueError(
                f"{str(folder)!r} leaves no text for {side} once copies are dropped: add text, or change "
                f"held_out_fraction={held_out_fraction}."
            )
    return {side: Dataset.from_list(domain.documents[side]) for side in SIDES}


def cut_to_pieces(text: str, longest: int) -> list[str]:
    """The text in pieces of at most `longest` characters, cut after a line break if possible; none is lost."""
    pieces, start = [], 0
    while len(text) - start > longest:
        end = text.rfind("\n", start, start + longest) + 1 or start + longest
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]
