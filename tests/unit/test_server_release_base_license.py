"""The base model's licence: said by a person, by its card, by its text, or plainly unknown."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.release.base_license import BaseLicense, copy_license_files, find_license

APACHE = (Path(__file__).parents[2] / "LICENSE").read_text()
CARD = "---\nlicense: llama3.2\nlanguage: en\n---\n\n# A model\n"
OTHER = "---\nlicense: other\nlicense_name: hospital-terms\n---\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, BaseLicense("unknown")),
        ({"README.md": "# A model\n"}, BaseLicense("unknown")),
        ({"README.md": "---\n: [\n---\n"}, BaseLicense("unknown")),
        ({"README.md": CARD}, BaseLicense("llama3.2", "", "as the base model's card says")),
        (
            {"README.md": OTHER},
            BaseLicense("other", "hospital-terms", "as the base model's card says"),
        ),
        ({"LICENSE": APACHE}, BaseLicense("apache-2.0", "", "by the text of its LICENSE")),
        (
            {"LICENSE.txt": "MIT License\n\nPermission is hereby granted, free of charge"},
            BaseLicense("mit", "", "by the text of its LICENSE.txt"),
        ),
        ({"LICENSE": "Ask us."}, BaseLicense("other", "LICENSE", "a text of its own")),
        # The card comes first: it is what its maker says of the whole.
        (
            {"README.md": CARD, "LICENSE": APACHE},
            BaseLicense("llama3.2", "", "as the base model's card says"),
        ),
    ],
)
def test_the_folder_says_it(tmp_path: Path, files: dict[str, str], expected: BaseLicense) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert find_license(tmp_path) == expected


def test_a_person_says_it_first(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text(APACHE)
    found = find_license(tmp_path, given="mit")
    assert found == BaseLicense("mit", "", "as whoever made this release says")


def test_licence_texts_go_along_also_out_of_a_cache_of_links(tmp_path: Path) -> None:
    cache = tmp_path / "models--org--base"
    base, target = cache / "snapshots" / "0a1b", tmp_path / "target"
    base.mkdir(parents=True)
    target.mkdir()
    (cache / "blobs").mkdir()
    (cache / "blobs" / "2c3d").write_text("Ask us.")
    (base / "LICENSE").symlink_to("../../blobs/2c3d")
    (base / "NOTICE").write_text("Made by us.")
    (base / "config.json").write_text("{}")
    copy_license_files(base, target)
    assert sorted(path.name for path in target.iterdir()) == ["LICENSE", "NOTICE"]
    assert not (target / "LICENSE").is_symlink()
    assert (target / "LICENSE").read_text() == "Ask us."


@pytest.mark.parametrize("name", ["LICENSE", "NOTICE.txt", "COPYING"])
def test_a_link_out_of_the_base_is_no_licence(tmp_path: Path, name: str) -> None:
    """A folder that was cloned can hold a link to any file of this machine."""
    base, target = tmp_path / "base", tmp_path / "target"
    base.mkdir()
    target.mkdir()
    (tmp_path / "release.pem").write_text("a private key")
    (base / name).symlink_to(tmp_path / "release.pem")
    copy_license_files(base, target)
    assert list(target.iterdir()) == []
    assert find_license(base) == BaseLicense("unknown")
