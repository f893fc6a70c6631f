"""Each counted token is a target exactly once, predicted from the tokens before it in its document and window only."""

import pickle
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distrib.data.documents import NOT_COUNTED, Classified, PaddedWindows, TokenWindows, WholeDocuments
from distrib.data.packing import DocumentWriter

Document = tuple[list[int], int]  # its tokens, and its number

DOCUMENTS = st.lists(
    st.lists(st.integers(0, 60_000), min_size=1, max_size=12).flatmap(
        lambda tokens: st.tuples(st.just(tokens), st.integers(1, len(tokens)))
    ),
    max_size=8,
)


def written(folder: str, documents: list[Document]) -> Path:
    with DocumentWriter(Path(folder), "train", "<u2") as writer:
        for tokens, number in documents:
            writer.add(tokens, number)
    return Path(folder)


def pieces(documents: list[Document], length: int, packed: bool) -> list[list[tuple[int, int, int]]]:
    """Compute token by token what each window holds: (document, index in the document, token)."""
    rows = [[(n, place, token) for place, token in enumerate(tokens)] for n, (tokens, _) in enumerate(documents)]
    if packed:
        rows = [[entry for row in rows for entry in row]]
    return [row[start : start + length + 1] for row in rows for start in range(0, len(row) - 1, length)]


@settings(max_examples=50)
@given(documents=DOCUMENTS, length=st.integers(2, 15), packed=st.booleans())
def test_windows_of_documents(documents: list[Document], length: int, packed: bool) -> None:
    with TemporaryDirectory() as folder:
        windows = TokenWindows(written(folder, documents), "train", length, packed)
        expected = pieces(documents, length, packed)
        assert len(windows) == len(expected)
        if not expected:
            return
        batch = windows.__getitems__(list(range(len(windows))))
        assert {key: value.shape for key, value in batch.items()} == dict.fromkeys(
            ("input_ids", "position_ids", "targets"), (len(windows), length)
        )
        counted = []
        for number, held in enumerate(expected):
            inputs, positions, targets = (batch[key][number].tolist() for key in batch)
            for place, (here, following) in enumerate(pairwise(held)):
                assert inputs[place] == here[2]
                first = next(entry for entry in held if entry[0] == here[0])  # of this document, in this window
                assert positions[place] == here[1] - first[1]
                if targets[place] != NOT_COUNTED:
                    assert following == (here[0], here[1] + 1, targets[place])
                    counted.append(following)
            assert set(targets[len(held) - 1 :]) <= {NOT_COUNTED}
            assert all(0 <= position < length for position in positions)
            for key, value in windows[number].items():  # one after the other
                torch.testing.assert_close(value, batch[key][number])
        assert counted == [
            (n, place, token)
            for n, (tokens, first) in enumerate(documents)
            for place, token in enumerate(tokens)
            if place >= first
        ]


Masked = list[tuple[int, bool]]  # the tokens of a document, and whether each is learned


@settings(max_examples=100)
@given(
    drawn=st.integers(2, 12).flatmap(
        lambda length: st.tuples(
            st.just(length),
            st.lists(st.lists(st.tuples(st.integers(0, 99), st.booleans()), max_size=length + 1), max_size=10),
        )
    ),
    packed=st.booleans(),
)
def test_whole_documents_with_a_mask(drawn: tuple[int, list[Masked]], packed: bool) -> None:
    length, documents = drawn
    with TemporaryDirectory() as folder:
        with DocumentWriter(Path(folder), "train", "<u2", masked=True) as writer:
            for document in documents:
                writer.add([token for token, _ in document], 0, [learned for _, learned in document])
        samples = WholeDocuments(Path(folder), "train", length, packed)
        expected: list[list[Masked]] = []  # windows of documents
        for document in filter(None, documents):
            if not packed or not expected or sum(map(len, expected[-1])) + len(document) > length + 1:
                expected.append([])
            expected[-1].append(document)
        assert len(samples) == len(expected)
        if not expected:
            return
        batch = samples.__getitems__(list(range(len(samples))))
        for number, window in enumerate(expected):
            inputs, positions, targets = (batch[key][number].tolist() for key in batch)
            held = [(place, *entry) for document in window for place, entry in enumerate(document)]
            filled = length + 1 - len(held)
            assert inputs[: len(held)] == [token for _, token, _ in held][:length]
            assert positions == ([place for place, _, _ in held] + [0] * filled)[:length]
            learned = [token if counted and place else NOT_COUNTED for place, token, counted in held]
            assert targets == (learned + [NOT_COUNTED] * filled)[1:]
            for key, value in samples[number].items():  # one after the other
                torch.testing.assert_close(value, batch[key][number])


@settings(max_examples=50)
@given(documents=DOCUMENTS.filter(bool), filler=st.integers(0, 100))
def test_documents_of_a_batch_are_padded_to_the_longest(documents: list[Document], filler: int) -> None:
    with TemporaryDirectory() as folder:
        batch = Classified(written(folder, documents), "train", filler).__getitems__(list(range(len(documents))))
        longest = max(len(tokens) for tokens, _ in documents)
        for row, (tokens, number) in enumerate(documents):
            left = longest - len(tokens)
            assert batch["input_ids"][row].tolist() == tokens + [filler] * left
            assert batch["attention_mask"][row].tolist() == [1] * len(tokens) + [0] * left
            assert batch["labels"][row] == number


def test_a_dataset_is_pickled_by_path_without_its_tokens(tmp_path: Path) -> None:
    folder = written(str(tmp_path), [(list(range(50_000)), 1)])
    with DocumentWriter(tmp_path, "masked", "<u2", masked=True) as writer:
        writer.add(list(range(50_000)), 0, [True] * 50_000)
    for dataset in (
        WholeDocuments(folder, "masked", 50_000, True),
        TokenWindows(folder, "train", 64, True),
        Classified(folder, "train", 0),
        PaddedWindows(folder, "train", 64, 256),
    ):
        sent = pickle.dumps(dataset)
        assert len(sent) < 1000
        torch.testing.assert_close(pickle.loads(sent)[0], dataset[0])


def test_an_index_out_of_range_raises_index_error(tmp_path: Path) -> None:
    windows = TokenWindows(written(str(tmp_path), [([1, 2, 3], 1)]), "train", 2, True)
    assert len(list(windows)) == 1
    with pytest.raises(IndexError):
        windows[1]
