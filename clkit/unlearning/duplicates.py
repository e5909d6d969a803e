"""Near-duplicates: retained records that say nearly what a forgotten one said.

Exact overlap of character n-grams through scikit-learn's vectoriser, not MinHash: only the forgotten records' n-grams
are indexed, so it is small anyway, nothing is missed by chance, and a long record that quotes a forgotten one is found
too (by containment), which an estimate of the Jaccard similarity can't see.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from clkit.unlearning.records import Record

# Characters in an n-gram: long enough that common words alone match nothing, and it works without spaces too.
_N = 8
# Share of a forgotten record's n-grams that must stand in a retained one.
THRESHOLD = 0.6


class Pair(NamedTuple):
    """A retained record, the forgotten one that it resembles most, and the share of the latter's n-grams in it."""

    retained: Record
    forgotten: Record
    overlap: float


def near_duplicates(
    forgotten: Sequence[Record], retained: Sequence[Record], threshold: float = THRESHOLD
) -> list[Pair]:
    """The retained records that contain most of a forgotten one, in the order of the data.

    Text is compared after NFKC, case folding and making white space single. Records shorter than 8 characters, and
    inputs that are not text, are compared by their content hash alone.
    """
    from sklearn.feature_extraction.text import CountVectorizer

    same = {r.content: r for r in forgotten}
    pairs = {r.place: Pair(r, same[r.content], 1.0) for r in retained if r.content in same}
    old = [r for r in forgotten if len(_plain(r)) >= _N]
    new = [r for r in retained if len(_plain(r)) >= _N and r.place not in pairs]
    if old and new:
        grams = CountVectorizer(analyzer="char", ngram_range=(_N, _N), binary=True, lowercase=False, dtype=np.int32)
        index = grams.fit_transform([_plain(r) for r in old])
        sizes = np.asarray(index.sum(axis=1)).ravel()
        for start in range(0, len(new), 4096):  # the product is dense: keep it small
            block = new[start : start + 4096]
            shares = (grams.transform([_plain(r) for r in block]) @ index.T).toarray() / sizes
            best = shares.argmax(axis=1)
            for row, record in enumerate(block):
                if shares[row, best[row]] >= threshold:
                    pairs[record.place] = Pair(record, old[best[row]], float(shares[row, best[row]]))
    return [pairs[r.place] for r in retained if r.place in pairs]


def _plain(record: Record) -> str:
    return " ".join(unicodedata.normalize("NFKC", record.text).casefold().split())
