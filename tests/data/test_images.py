"""Images are documents of pixels, and a report shows drawn images beside real ones."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Outcome
from mnist import random_images, write_mnist
from PIL import Image
from pyarrow import parquet, table

from memformer_pl import SegmentData
from memformer_pl.analysis.samples import draw_images, sample_images
from memformer_pl.data import MNIST, Digits, Document, GreyValues
from memformer_pl.data.tokenizers.subwords import deserialize_tokenizer
from memformer_pl.models import Memformer


def test_a_digit_is_sixty_four_pixels_of_seventeen_grey_values() -> None:
    documents = list(Digits().documents())
    pixels = np.stack([np.frombuffer(document.content, dtype=np.uint8) for document in documents])
    assert pixels.shape == (1797, 64)
    assert (pixels.min(), pixels.max()) == (0, Digits.white)
    # a digit is drawn in the middle: its outermost columns are nearly empty
    assert pixels.reshape(-1, *Digits.shape).mean((0, 1)).argmax() in (3, 4)


def test_mnist_of_the_hub_is_read_pixel_by_pixel_with_its_splits(tmp_path: Path) -> None:
    train, test = random_images(70), random_images(3)
    documents = list(MNIST(path=str(write_mnist(tmp_path, {"train": train, "test": test}))).documents())
    assert [document.split for document in documents] == ["train"] * 70 + ["test"] * 3
    assert [document.content for document in documents] == [image.tobytes() for image in (*train, *test)]


def test_mnist_is_read_from_a_column_not_declared_as_images(tmp_path: Path) -> None:
    (image,) = random_images(1)
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="png")
    (tmp_path / "mnist").mkdir()
    rows = table({"image": [{"bytes": stream.getvalue(), "path": None}], "label": [1]})
    parquet.write_table(rows, tmp_path / "mnist" / "train.parquet")
    (document,) = MNIST(path=str(tmp_path / "mnist")).documents()
    assert document.content == image.tobytes()


def test_images_of_another_size_and_columns_without_images_are_refused(tmp_path: Path) -> None:
    path = str(write_mnist(tmp_path, {"train": random_images(1, size=8)}))
    with pytest.raises(ValueError, match="images must have 28 x 28 pixels, got 8 x 8"):
        list(MNIST(path=path).documents())
    with pytest.raises(ValueError, match="column field='label' holds int, not an image"):
        list(MNIST(path=path, field="label").documents())
    with pytest.raises(ValueError, match="no column field='pixels'"):
        list(MNIST(path=path, field="pixels").documents())


def test_drawn_images_come_from_a_session_and_real_ones_are_held_out(pack_cache: Path) -> None:
    data = SegmentData(
        corpus=Digits(), tokenizer=GreyValues(values=17), segment_length=8, validation=0.2, cache=pack_cache
    )
    data.setup()
    model = Memformer(
        vocab_size=17, dim=16, heads=2, encoder_layers=1, decoder_layers=1, slots=2, segment_length=8
    ).eval()
    # a model that always predicts one grey value draws it
    with torch.no_grad():
        model.decoder_norm.weight.zero_()
        model.decoder_norm.bias.copy_(100 * model.embedding.weight[7])
    arrays = sample_images(model, data.packed.validation, Digits())
    assert arrays["drawn"].shape == arrays["real"].shape == (40, 8, 8)
    assert np.unique(arrays["drawn"]).tolist() == [7]
    held_out = {np.asarray(data.packed.validation.document(n)).tobytes() for n in range(len(data.packed.validation))}
    assert {image.tobytes() for image in arrays["real"]} <= held_out
    real, picture = draw_images(arrays).axes
    assert real.get_title() == "real: 40 images"
    assert picture.images[0].get_array().shape == (4 * 9, 10 * 9)


def test_the_report_of_a_run_on_images_shows_drawn_images(
    command: Callable[..., Outcome], tmp_path: Path, pack_cache: Path
) -> None:
    experiments = Path(__file__).parents[2] / "experiments"
    config = [f"--config={experiments / 'table1' / 'digits' / 'base.yaml'}", f"--data.cache={pack_cache}"]
    sizes = [f"--model.model.init_args.{name}" for name in ("dim=8", "heads=2", "encoder_layers=1", "decoder_layers=1")]
    steps = ["--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false"]
    where = [f"--trainer.logger.init_args.save_dir={tmp_path}", "--trainer.log_every_n_steps=1"]
    common = [*config, *sizes, *steps, *where]
    assert command("fit", *common).code == 0
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    outcome = command("analyze", *common, f"--ckpt_path={checkpoint}", f"--out={tmp_path / 'report'}", "--segments=4")
    assert outcome.code == 0
    assert "Sampled images" in (tmp_path / "report" / "report.html").read_text()
    assert np.load(tmp_path / "report" / "images.npz")["drawn"].shape == (40, 8, 8)


def test_grey_values_decode_to_numbers_and_their_tokenizer_is_restored() -> None:
    tokenizer = deserialize_tokenizer(GreyValues(values=17).serialize())
    (pixels,) = tokenizer.encode_documents([Document(bytes([0, 16, 3]), name="image")])
    assert (pixels.tolist(), tokenizer.vocab_size, tokenizer.decode(pixels)) == ([0, 16, 3], 17, "0 16 3 ")
    decoder = tokenizer.incremental_decoder()
    assert decoder.add(3) + decoder.add(16) + decoder.end() == "3 16 "
    with pytest.raises(ValueError, match="image has a pixel of 17, but values=17"):
        tokenizer.encode_documents([Document(bytes([17]), name="image")])
    with pytest.raises(ValueError, match="values must be 1 to 256"):
        GreyValues(values=300)
