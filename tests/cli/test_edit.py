from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from reasonpix.cli.main import cli
from reasonpix.core.images import decode
from reasonpix.editing.image_grid import CELL, GAP, arrange_grid, shrink
from reasonpix.editing.output_files import check_writable, output_paths, write_image
from reasonpix.editing.pipeline import ReasonPix2Pix
from reasonpix.errors import ReasonpixError
from tests.conftest import Shell
from tests.support.tiny_model import write_tiny

WORDS = "make it rain"
Pixels = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny", num_inference_steps=2)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def picture(seed: int = 0, size: tuple[int, int] = (40, 32)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


def call(*arguments: object) -> Result:
    words = [str(it) for it in arguments]
    if "--device" not in words:
        words += ["--device", "cpu"]
    return CliRunner().invoke(cli, ["edit", *words])


def pixels(path: Path | str) -> Pixels:
    return np.asarray(Image.open(path).convert("RGB"))


def told(result: Result, code: int = 1) -> str:
    """What was said in one line, without a traceback."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()[-1:]
    assert "Traceback" not in result.stderr
    return line


# -- as a user has it ----------------------------------------------------------------------------


def test_a_process_edits_files_of_all_kinds(tiny: Path, shell: Shell, tmp_path: Path) -> None:
    inputs = {
        "plain.jpg": picture(1, (90, 60)),
        "clear.png": picture(2, (33, 47)),
        "deep.png": Image.fromarray(np.asarray(picture(3).convert("L")).astype(np.uint16) * 257),
        "turned.jpg": picture(4, (64, 32)),
    }
    inputs["clear.png"].putalpha(128)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, image in inputs.items():
        image.save(tmp_path / name, **({"exif": exif} if name.startswith("turned") else {}))
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    names = ["plain.jpg", "broken.jpg", "clear.png", "deep.png", "turned.jpg"]
    done = shell("edit", *names, "--instruction", WORDS, "--model", tiny, "--device", "cpu",
                 "--out", "edits", "--seed", "3")  # fmt: skip
    assert done.stderr == "broken.jpg: not an image, or a format that cannot be read\n"
    assert done.returncode == 1
    written = {f"edits/{Path(name).stem}-edited.png" for name in names if "broken" not in name}
    assert set(done.stdout.splitlines()) == written
    assert {f"edits/{path.name}" for path in (tmp_path / "edits").iterdir()} == written
    sizes = {name: decode((tmp_path / name).read_bytes()).size for name in inputs}
    assert sizes["turned.jpg"] == (32, 64)
    model = ReasonPix2Pix.from_pretrained(tiny, device="cpu")
    for name, size in sizes.items():
        edited = pixels(tmp_path / "edits" / f"{Path(name).stem}-edited.png")
        assert edited.shape == (size[1], size[0], 3)
        # Alone and in another process the same comes out.
        (expected,) = model([decode((tmp_path / name).read_bytes())], WORDS, seed=3)
        assert np.array_equal(edited, np.asarray(expected)), name


def test_help_imports_nothing_heavy() -> None:
    code = """if True:
        import sys
        from reasonpix.cli.main import cli
        try:
            cli(["edit", "--help"])
        except SystemExit:
            heavy = {"torch", "transformers", "diffusers", "numpy", "pydantic", "PIL"}
            print("HEAVY", *sorted(heavy & set(sys.modules)))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "HEAVY"


# -- what is written -----------------------------------------------------------------------------


def test_every_image_by_every_instruction_and_seed(tiny: Path, here: Path) -> None:
    picture(1).save("one.png")
    picture(2).save("two.bmp")
    result = call("one.png", "two.bmp", "--instruction", WORDS, "--instruction", "it is late",
                  "--samples", 2, "--seed", 5, "--model", tiny)  # fmt: skip
    assert (result.exit_code, result.stderr) == (0, "")
    names = [
        f"{stem}-edited-{number}-seed{seed}.png"
        for stem in ("one", "two")
        for number in (1, 2)
        for seed in (5, 6)
    ]
    assert sorted(result.stdout.split()) == sorted(names)
    assert len({pixels(name).tobytes() for name in names}) == len(names)
    model = ReasonPix2Pix.from_pretrained(tiny, device="cpu")
    (expected,) = model([picture(2)], "it is late", seed=6)
    assert np.array_equal(pixels("two-edited-2-seed6.png"), np.asarray(expected))


@pytest.mark.parametrize(("suffix", "kind"), [("jpg", "JPEG"), ("webp", "WEBP"), ("PNG", "PNG")])
def test_a_file_of_the_format_that_its_name_says(
    tiny: Path, here: Path, suffix: str, kind: str
) -> None:
    picture().save("bee.png")
    out = f"new/bee.{suffix}"
    result = call("bee.png", "--instruction", WORDS, "--model", tiny, "--out", out)
    assert (result.exit_code, result.stdout) == (0, f"{out}\n")
    with Image.open(out) as image:
        assert (image.format, image.size) == (kind, (40, 32))
    assert [path.name for path in (here / "new").iterdir()] == [f"bee.{suffix}"]


def test_side_by_side(tiny: Path, here: Path) -> None:
    picture().save("bee.png")
    call("bee.png", "--instruction", WORDS, "--model", tiny, "--out", "plain.png")
    result = call("bee.png", "--instruction", WORDS, "--model", tiny, "--side-by-side")
    assert (result.exit_code, result.stdout) == (0, "bee-edited.png\n")
    sheet = pixels("bee-edited.png")
    assert sheet.shape == (32, 40 + GAP + 40, 3)
    assert np.array_equal(sheet[:, :40], pixels("bee.png"))
    assert np.array_equal(sheet[:, -40:], pixels("plain.png"))
    assert (sheet[:, 40:-40] == 255).all()


def test_a_grid_has_a_row_for_each_image(tiny: Path, here: Path) -> None:
    picture(1, (40, 32)).save("one.png")
    (here / "broken.png").write_bytes(b"")
    picture(2, (24, 60)).save("two.png")
    call("two.png", "--instruction", WORDS, "--model", tiny, "--seed", 1, "--out", "plain.png")
    result = call("one.png", "broken.png", "two.png", "--instruction", WORDS, "--samples", 2,
                  "--model", tiny, "--grid")  # fmt: skip
    assert (result.exit_code, result.stdout) == (1, "grid.png\n")
    assert result.stderr == "broken.png: the file is empty\n"
    sheet = pixels("grid.png")
    assert sheet.shape == (32 + GAP + 60, 3 * 40 + 2 * GAP, 3)
    assert np.array_equal(sheet[:32, :40], pixels("one.png"))
    last = sheet[32 + GAP :, 2 * (40 + GAP) + 8 :][:, :24]
    assert np.array_equal(last, pixels("plain.png"))


def test_options_reach_the_sampler(tiny: Path, here: Path) -> None:
    picture().save("bee.png")
    model = ReasonPix2Pix.from_pretrained(tiny, device="cpu")
    options = {"steps": 3, "seed": 9, "guidance-scale": 2, "image-guidance-scale": 1.25}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    result = call("bee.png", "--instruction", WORDS, "--model", tiny, "--resolution", 48, *words)
    assert result.exit_code == 0, result.output
    (expected,) = model([picture()], WORDS, seed=9, num_inference_steps=3, guidance_scale=2,
                        image_guidance_scale=1.25, resolution=48)  # fmt: skip
    assert np.array_equal(pixels("bee-edited.png"), np.asarray(expected))


# -- what is not overwritten ---------------------------------------------------------------------


def test_files_are_replaced_by_force_alone(tiny: Path, here: Path) -> None:
    picture().save("bee.png")
    (here / "bee-edited.png").write_text("precious")
    arguments = ("bee.png", "--instruction", WORDS, "--model", tiny)
    assert told(call(*arguments)) == "bee-edited.png exists; name another by --out, or give --force"
    assert (here / "bee-edited.png").read_text() == "precious"
    assert call(*arguments, "--force").exit_code == 0
    assert pixels("bee-edited.png").shape == (32, 40, 3)


def test_an_input_is_never_replaced(here: Path) -> None:
    picture().save("bee.png")
    (here / "link.png").symlink_to("bee.png")
    before = (here / "bee.png").read_bytes()
    for out in ("bee.png", "./bee.png", "link.png", here / "bee.png"):
        result = call("bee.png", "--instruction", WORDS, "--model", "x", "--out", out, "--force")
        assert "is an input, which is never replaced" in told(result)
    assert (here / "bee.png").read_bytes() == before


# -- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["bee.png", "--model", "none"], 1, "bee.png: no such file"),
        ([".", "--model", "none"], 1, ".: a folder; name the images in it"),
        (["ok.png", "--model", "./none"], 1, "model: no folder './none'; give a hub id"),
        (
            ["ok.png", "--model", "."],
            1,
            "model: '.' is not an editing model: it has no model_index",
        ),
        (["ok.png", "--model", "TINY", "--guidance-scale", "-1"], 1, "guidance_scale: input sho"),
        (["ok.png", "--model", "TINY", "--steps", "2000"], 1, "2000 steps exceed the 1000"),
        (["ok.png", "--model", "TINY", "--device", "cuda:77"], 1, "device: 'cuda:77' cannot be "),
        (["ok.png", "--model", "TINY", "--instruction", " "], 2, "--instruction: say what to do"),
        (["ok.png", "--model", "x", "--grid", "--side-by-side"], 2, "--grid shows the inputs"),
        (["ok.png", "--model", "x", "--samples", "2", "--out", "a.png"], 1, "a.png is one file"),
        (["ok.png", "ok.png", "--model", "x"], 1, "ok.png and ok.png would both be written as"),
        (["ok.png", "--model", "x", "--out", "a.gif"], 1, "a.gif: edits are written as .png, "),
        (["ok.png", "--model", "x", "--out", "ok.png/in"], 1, "cannot make the folder ok.png/in:"),
        (["ok.png", "--model", "x", "--seed", "-1"], 2, "'--seed'"),
    ],
)
def test_errors_are_one_line(
    tiny: Path, here: Path, arguments: list[str], code: int, message: str
) -> None:
    picture().save("ok.png")
    result = call("--instruction", WORDS, *(str(tiny) if it == "TINY" else it for it in arguments))
    assert message in told(result, code)
    assert [path.name for path in here.iterdir()] == ["ok.png"]


def test_an_encoder_that_is_not_installed(tiny: Path, here: Path) -> None:
    picture().save("bee.png")
    other = here / "other"
    shutil.copytree(tiny, other)
    facts = json.loads((other / "reasonpix.json").read_text())
    facts["encoder"] = {"use": "qwen-of-tomorrow"}
    (other / "reasonpix.json").write_text(json.dumps(facts))
    line = told(call("bee.png", "--instruction", WORDS, "--model", other))
    assert "no encoder 'qwen-of-tomorrow'" in line and "installed" in line


def test_every_missing_image_is_named(here: Path) -> None:
    result = call("a.png", "b.png", "--instruction", WORDS, "--model", "x")
    assert result.exit_code == 1
    assert result.stderr == "a.png: no such file\nb.png: no such file\n"


# -- sheets --------------------------------------------------------------------------------------


def test_a_grid_centres_what_is_smaller_and_leaves_gaps_white() -> None:
    red, blue = Image.new("RGB", (10, 20), "red"), Image.new("RGB", (30, 6), "blue")
    sheet = np.asarray(arrange_grid([[red, blue], [blue, None]]))
    assert sheet.shape == (20 + GAP + 6, 30 + GAP + 30, 3)
    assert (sheet[:20, 10:20] == (255, 0, 0)).all()
    assert (sheet[7:13, 30 + GAP :] == (0, 0, 255)).all()
    assert (sheet[20 + GAP :, :30] == (0, 0, 255)).all()
    assert (sheet == 255).all(-1).sum() == sheet[..., 0].size - 200 - 2 * 180


def test_large_images_are_shrunk_for_a_grid() -> None:
    assert shrink(picture(0, (1000, 300))).size == (CELL, 154)
    assert shrink(picture(0, (2, 4000))).size == (1, CELL)
    small = picture()
    assert shrink(small) is small


def test_names(tmp_path: Path) -> None:
    one, two = Path("a/Bee.jpg"), Path("b/bee.png")
    assert output_paths(tmp_path, [one], 1, range(3, 4), False) == [tmp_path / "Bee-edited.png"]
    assert output_paths(tmp_path / "x.jpg", [one], 1, range(1), False) == [tmp_path / "x.jpg"]
    assert output_paths(tmp_path / "x.jpg", [one, two], 2, range(9), True) == [tmp_path / "x.jpg"]
    assert output_paths(tmp_path / "v1.2", [one], 1, range(1), True) == [
        tmp_path / "v1.2" / "grid.png"
    ]
    (tmp_path / "odd.png").mkdir()
    (named,) = output_paths(tmp_path / "odd.png", [one], 1, range(1), False)
    assert named == tmp_path / "odd.png" / "Bee-edited.png"
    with pytest.raises(ReasonpixError, match=r"a/Bee.jpg and b/bee.png would both be written"):
        output_paths(tmp_path, [one, two], 1, range(1), False)


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "wide.jpg"
    with pytest.raises(ReasonpixError, match=r"cannot write .*wide.jpg: "):
        write_image(Image.new("RGB", (70_000, 1)), file)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(ReasonpixError, match="exists"):
        check_writable([tmp_path / "taken.png"], [], overwrite=True)


def test_weights_of_a_variant_of_a_model_with_a_purpose(tiny: Path, here: Path) -> None:
    model = Path(shutil.copytree(tiny, here / "model"))
    for part in ("unet", "vae"):
        [file] = (model / part).glob("*.safetensors")
        file.rename(file.with_suffix(".fp16.safetensors"))
    purpose = {"domain": "faces", "description": "photographs of faces"}
    (model / "intended_images.json").write_text(json.dumps(purpose))
    picture(1).save("one.png")
    for name, folder, more in (("a.png", tiny, ()), ("b.png", model, ("--variant", "fp16"))):
        result = call("one.png", "--instruction", WORDS, "--model", folder, "--out", name, *more)
        assert result.exit_code == 0, result.output
    assert result.stderr == (
        f"warning: {model}: made for photographs of faces only; if your images show something "
        "else, the results are meaningless, and filters do not detect it\n"
    )
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    result = call("one.png", "--instruction", WORDS, "--model", model, "--variant", "bf16")
    assert "no weights of the variant 'bf16'; it has fp16" in told(result)
