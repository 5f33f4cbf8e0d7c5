"""Sources of installed packages are found, chosen by rules, and split by package."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from jsonargparse import ArgumentParser

from memformer_pl import SegmentData
from memformer_pl.data import Bytes, InstalledPackages
from memformer_pl.data.corpora import installed
from memformer_pl.data.corpora.installed import (
    is_generated,
    is_table,
    is_vendored,
    line_hashes,
    near_copies,
    split_packages,
)


def word(number: int) -> str:
    return "".join(chr(ord("a") + int(digit)) for digit in f"{number:04}")


def code(seed: int, lines: int = 12) -> str:
    """Source whose lines occur in no source of another seed."""
    body = (
        f"    {word(seed)}.{word(number)} = compute_the_{word(number)}_of_{word(seed)}()" for number in range(lines)
    )
    return "\n".join([f"def the_function_{word(seed)}():", *body, ""])


def install(
    folder: Path,
    name: str,
    files: Mapping[str, str | bytes],
    *,
    version: str = "1.0",
    record: bool = True,
    missing: tuple[str, ...] = (),
    origin: Mapping[str, object] | None = None,
) -> None:
    """Write a distribution as an installer does; ``missing`` are files that are on record only."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if origin is not None:
        (info / "direct_url.json").write_text(json.dumps(origin))
    if record:
        with (info / "RECORD").open("w", newline="") as file:
            csv.writer(file).writerows([path, "", ""] for path in (*files, *missing, f"{info.name}/RECORD"))


def corpus(*folders: Path, validation: float = 0.0, test: float = 0.0) -> InstalledPackages:
    return InstalledPackages(paths=[str(folder) for folder in folders], validation=validation, test=test)


def names(*folders: Path) -> list[str]:
    """The documents, as paths within the folder of each installation."""
    found = [Path(document.name) for document in corpus(*folders).documents()]
    return [next(path.relative_to(root).as_posix() for root in folders if path.is_relative_to(root)) for path in found]


def test_the_sources_on_record_are_documents_byte_for_byte_in_order(tmp_path: Path) -> None:
    install(tmp_path, "Second_Name", {"two/b.py": code(1), "two/a.py": code(2), "two/data.txt": code(3)})
    install(tmp_path, "first", {"one.py": code(4).replace("\n", "\r\n")})
    (tmp_path / "two" / "not_on_record.py").write_text(code(5))
    documents = list(corpus(tmp_path).documents())
    assert [document.name for document in documents] == [
        str(tmp_path / name) for name in ("one.py", "two/a.py", "two/b.py")
    ]
    assert documents[0].content == code(4).replace("\n", "\r\n").encode()
    assert {document.split for document in documents} == {"train"}
    assert list(corpus(tmp_path).documents()) == documents


def test_this_project_editable_installations_and_packages_without_a_record_are_left_out(tmp_path: Path) -> None:
    install(tmp_path, "kept", {"kept.py": code(1)}, origin={"url": "file:///somewhere", "dir_info": {}})
    install(tmp_path, "memformer_pl", {"memformer_pl/a.py": code(2)})
    install(tmp_path, "edited", {"edited.py": code(3)}, origin={"url": "", "dir_info": {"editable": True}})
    install(tmp_path, "unrecorded", {"unrecorded.py": code(4)}, record=False)
    (tmp_path / "nameless-1.dist-info").mkdir()
    (tmp_path / "old.py").write_text(code(5))
    (tmp_path / "old.egg-info").mkdir()
    (tmp_path / "old.egg-info" / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: old\nVersion: 1.0\n")
    (tmp_path / "old.egg-info" / "SOURCES.txt").write_text("old.py\n")
    assert names(tmp_path) == ["kept.py"]


def test_files_outside_the_installation_and_files_that_do_not_exist_are_left_out(tmp_path: Path) -> None:
    outside = tmp_path / "bin" / "script.py"
    outside.parent.mkdir()
    outside.write_text(code(1))
    install(tmp_path / "lib", "tool", {"tool.py": code(2)}, missing=("../bin/script.py", str(outside), "gone.py"))
    assert names(tmp_path / "lib") == ["tool.py"]


def test_a_package_found_twice_counts_once_the_first_on_the_path(tmp_path: Path) -> None:
    install(tmp_path / "a", "some-package", {"some.py": code(1)})
    install(tmp_path / "b", "Some.Package", {"some.py": code(2)}, version="2.0")
    assert [document.content for document in corpus(tmp_path / "a", tmp_path / "b").documents()] == [code(1).encode()]
    assert [document.content for document in corpus(tmp_path / "b", tmp_path / "a").documents()] == [code(2).encode()]
    install(tmp_path / "c", "some_package", {"x.pth": ""}, origin={"dir_info": {"editable": True}})
    install(tmp_path / "c", "other", {"other.py": code(3)})
    assert names(tmp_path / "c", tmp_path / "a") == ["other.py"]  # an import would not reach the second either


@pytest.mark.parametrize(
    ("path", "vendored"),
    [
        ("pip/_vendor/rich/a.py", True),
        ("joblib/externals/a.py", True),
        ("a/third_party/b.py", True),
        ("a/vendor.py", False),
        ("sympy/external/importtools.py", False),
    ],
)
def test_folders_for_copies_of_other_packages_are_known(path: str, vendored: bool, tmp_path: Path) -> None:
    assert is_vendored(Path(path)) == vendored
    install(tmp_path, "some", {path: code(1), "kept.py": code(2)})
    assert (path in names(tmp_path)) != vendored


@pytest.mark.parametrize(
    ("head", "generated"),
    [
        ("# Generated by the protocol buffer compiler.  DO NOT EDIT!\n", True),
        ("#    This file was automatically generated from src/models.py\n", True),
        ("# @generated\n", True),
        ('"""Tables.\n\nThis file is autogenerated by a script.\n"""\n', True),
        ('"""The group generated by permutations; the numbers were generated by a user."""\n', False),
        ('write("do not edit")\n', False),
        (code(3, lines=60) + "# Generated by a script\n", False),
    ],
)
def test_files_that_say_at_their_beginning_that_they_are_generated_are_left_out(
    head: str, generated: bool, tmp_path: Path
) -> None:
    assert is_generated(head.encode()) == generated
    install(tmp_path, "some", {"head.py": head + code(1), "kept.py": code(2)})
    assert ("head.py" in names(tmp_path)) != generated


def test_tables_in_the_form_of_code_are_left_out(tmp_path: Path) -> None:
    numbers = "\n".join(f"    {number}: Likelihood.POSITIVE,  # '{word(number)}'" for number in range(90))
    polynomial = "\n".join(f"f{word(n)} = {n}*x**{n}*y**{n} + {n + 1}*x*y**{n + 2}" for n in range(40))
    listed = "\n".join(f"    '{word(number)} is a name',\n    \"{word(number)} is another\"," for number in range(90))
    tables = {"numbers.py": numbers, "polynomial.py": polynomial, "listed.py": listed}
    assert all(is_table(content.encode()) for content in tables.values())
    assert not is_table(code(1, lines=90).encode())
    assert not is_table(Path(installed.__file__).read_bytes())
    install(tmp_path, "some", {**tables, "kept.py": code(1)})
    assert names(tmp_path) == ["kept.py"]


def test_files_without_text_and_files_that_are_not_utf8_are_left_out(tmp_path: Path) -> None:
    odd = {"empty.py": "", "short.py": "from . import a\n", "latin.py": f"# caf\u00e9\n{code(1)}".encode("latin-1")}
    install(tmp_path, "some", {**odd, "kept.py": f"# caf\u00e9\n{code(2)}"})
    assert names(tmp_path) == ["kept.py"]


def test_of_two_near_copies_the_one_with_more_lines_is_kept_else_the_first(tmp_path: Path) -> None:
    install(tmp_path, "a", {"a.py": code(1, lines=20), "aa.py": code(2) + code(3, lines=10)})
    install(tmp_path, "b", {"b.py": "import b\n" + code(1, lines=30), "bb.py": "import bb\n" + code(2)})
    install(tmp_path, "c", {"c.py": code(4).replace("    ", "\t"), "cc.py": code(4)})
    assert names(tmp_path) == ["aa.py", "b.py", "c.py"]


def test_a_file_is_a_near_copy_if_more_than_half_of_its_lines_are_in_others(tmp_path: Path) -> None:
    # files of 8, 6 and 4 lines: the second has 3 of the first; the last has 2 of the first, and 1 of the second
    lines = [*range(8), *(0, 1, 2, 10, 11, 12), *(3, 4, 12, 20)]
    assert near_copies(np.array(lines), [8, 6, 4]).tolist() == [False, False, True]
    assert near_copies(np.array([*lines[:17], 21]), [8, 6, 4]).tolist() == [False, False, True]
    lines[16] = 22
    assert near_copies(np.array(lines), [8, 6, 4]).tolist() == [False, False, False]
    order = [*lines[14:], *lines[:8], 0, 1, 2, 3, 11, 12]
    assert near_copies(np.array(order), [4, 8, 6]).tolist() == [False, False, True]


def test_of_many_equal_files_the_first_is_kept() -> None:
    assert near_copies(np.zeros(500, dtype=np.int64), [1] * 500).tolist() == [False] + [True] * 499


def test_lines_are_compared_without_indentation_once_each_and_not_if_short() -> None:
    long = "a line of twenty bytes"
    assert len(line_hashes(f"{long}\n    {long}\r\n\nshort = line\n".encode())) == 1
    assert line_hashes(b"x" * 20) == line_hashes(b"  " + b"x" * 20 + b"\t") != set()
    assert line_hashes(b"x" * 19) == set()


def test_near_copies_across_packages_are_never_on_both_sides_of_a_split(tmp_path: Path) -> None:
    for number in range(12):
        own = {
            f"p{number}/own.py": code(100 + number),
            f"p{number}/copy.py": f"import {word(number)}\n{code(number % 3)}",
        }
        install(tmp_path, f"package-{number}", own)
    sides: dict[str, set[str]] = {}
    for document in corpus(tmp_path, validation=0.3, test=0.3).documents():
        for line in document.content.decode().split("\n"):
            sides.setdefault(line, set()).add(document.split)
    split = {line: found for line, found in sides.items() if len(found) > 1 and len(line) >= 20}
    assert split == {}
    assert set.union(*sides.values()) == {"train", "validation", "test"}


def test_no_package_is_in_two_splits_and_no_share_is_exceeded(tmp_path: Path) -> None:
    for number in range(30):
        sources = {f"p{number}/{part}.py": code(10 * number + part, lines=5 + number) for part in range(2)}
        install(tmp_path, f"package-{number}", sources)
    sizes: dict[str, int] = {}
    splits: dict[str, set[str]] = {}
    for document in corpus(tmp_path, validation=0.2, test=0.1).documents():
        sizes[document.split] = sizes.get(document.split, 0) + len(document.content)
        splits.setdefault(Path(document.name).parent.name, set()).add(document.split)
    assert len(splits) == 30
    assert all(len(found) == 1 for found in splits.values())
    total = sum(sizes.values())
    assert 0.15 * total < sizes["validation"] <= 0.2 * total
    assert 0.06 * total < sizes["test"] <= 0.1 * total


def test_shares_are_of_the_bytes_that_are_kept(tmp_path: Path) -> None:
    install(tmp_path, "twins", {f"twins/{number}.py": f"import {word(number)}\n{code(0)}" for number in range(20)})
    for number in range(1, 6):
        install(tmp_path, f"package-{number}", {f"p{number}.py": code(number)})
    splits = [document.split for document in corpus(tmp_path, validation=0.2).documents()]
    assert (splits.count("train"), splits.count("validation")) == (5, 1)


def test_giant_packages_are_trained_on_and_names_alone_order_the_others() -> None:
    sizes = {"giant": 900, **{f"small-{number}": 10 for number in range(10)}}
    splits = split_packages(sizes, validation=0.03, test=0.02)
    assert splits["giant"] == "train"
    assert sorted(splits.values()) == ["test"] * 2 + ["train"] * 6 + ["validation"] * 3
    assert splits == split_packages(dict(reversed(sizes.items())), validation=0.03, test=0.02)


def test_segment_data_keeps_the_splits(tmp_path: Path) -> None:
    for number in range(10):
        install(tmp_path / "lib", f"package-{number}", {f"p{number}.py": code(number)})
    source = corpus(tmp_path / "lib", validation=0.2, test=0.1)
    data = SegmentData(corpus=source, tokenizer=Bytes(), validation=0.4, test=0.4, cache=tmp_path / "cache")
    data.setup()
    assert [len(split) for split in (data.packed.train, data.packed.validation, data.packed.test)] == [7, 2, 1]
    source = corpus(tmp_path / "lib", validation=0.2, test=0.0)
    for share, expected in ((0.0, [8, 2, 0]), (0.25, [6, 2, 2])):  # a split that it does not bring is taken from train
        data = SegmentData(corpus=source, tokenizer=Bytes(), test=share, cache=tmp_path / "cache")
        data.setup()
        assert [len(split) for split in (data.packed.train, data.packed.validation, data.packed.test)] == expected


def test_the_identity_changes_with_files_versions_and_shares(tmp_path: Path) -> None:
    install(tmp_path / "a", "some", {"some.py": code(1)})
    install(tmp_path / "b", "some", {"some.py": code(1)}, version="2.0")
    before = corpus(tmp_path / "a").identity()
    assert before == corpus(tmp_path / "a").identity() == json.loads(json.dumps(before))
    assert before != corpus(tmp_path / "a", test=0.1).identity()
    assert before["packages"] == {"some": "1.0"}
    assert corpus(tmp_path / "b").identity()["packages"] == {"some": "2.0"}
    (tmp_path / "a" / "some.py").write_text(code(2))
    assert corpus(tmp_path / "a").identity() != before


def test_the_identity_changes_with_the_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "some", {"some.py": code(1)})
    before = corpus(tmp_path).identity()
    monkeypatch.setattr(installed, "RULES", installed.RULES + 1)
    assert corpus(tmp_path).identity() != before


def test_only_sources_on_record_would_be_read(tmp_path: Path) -> None:
    install(tmp_path, "some", {"some.py": code(1)}, missing=("gone.py",))
    (tmp_path / "link.py").symlink_to(tmp_path / "some.py")
    reads = {
        name
        for name in ("some.py", "gone.py", "link.py", "new.py", "last.ckpt")
        if corpus(tmp_path).would_read(tmp_path / name)
    }
    assert reads == {"some.py", "gone.py", "link.py"}


def test_an_environment_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found no sources of installed packages, got paths="):
        list(corpus(tmp_path).documents())


@pytest.mark.parametrize(("validation", "test"), [(-0.1, 0.0), (0.5, 0.5), (0.0, float("nan"))])
def test_shares_out_of_range_are_refused(validation: float, test: float) -> None:
    with pytest.raises(ValueError, match="validation and test must be at least 0 with a sum below 1, got"):
        InstalledPackages(validation=validation, test=test)


@pytest.mark.parametrize(
    ("paths", "reason"),
    [
        ([], "paths must be one or more folders of installed packages"),
        (["missing"], "paths must be one or more folders of installed packages"),
        (["~nobody-has-this-name/lib"], "cannot read a path"),
    ],
)
def test_paths_that_are_not_folders_are_refused(paths: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=f"{reason}, got paths="):
        InstalledPackages(paths=paths)


@pytest.mark.parametrize(("validation", "test", "named"), [(0.01, 0.0, "validation=0.01"), (0.5, 0.01, "test=0.01")])
def test_a_share_into_which_no_package_fits_is_refused(
    tmp_path: Path, validation: float, test: float, named: str
) -> None:
    for number in range(2):
        install(tmp_path, f"package-{number}", {f"p{number}.py": code(number)})
    with pytest.raises(ValueError, match=f"no package fits into the share {named} of .* bytes in 2 packages"):
        list(corpus(tmp_path, validation=validation, test=test).documents())


def test_the_corpus_is_chosen_by_class_name(tmp_path: Path) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(SegmentData, "data")
    data = parser.instantiate(parser.parse_args(["--data.corpus=InstalledPackages", "--data.corpus.test=0.1"])).data
    assert isinstance(data.corpus, InstalledPackages)
    assert (data.corpus.paths, data.corpus.validation, data.corpus.test) == (None, 0.05, 0.1)


def test_the_packages_of_this_environment_are_found() -> None:
    sources = list(installed._sources(InstalledPackages()._distributions()))
    found = {source.name for source in sources if source.package == "pytest"}
    assert "_pytest/python.py" in found
    assert all(source.path.is_file() for source in sources if source.package == "pytest")
    assert not [source for source in sources if "memformer_pl" in source.path.parts]
