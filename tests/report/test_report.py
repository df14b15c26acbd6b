# SPDX-License-Identifier: Apache-2.0
"""What the report page holds, and what it refuses."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import tiny
from PIL import Image
from safetensors.numpy import load_file
from synthetic_run import CLASSES, dump, make_item, make_run, results, weights

from digseg_jax import jobs
from digseg_jax.data.datasets import registry
from digseg_jax.data.datasets.landcover import GROUPS
from digseg_jax.errors import UserError
from digseg_jax.models import functional
from digseg_jax.models.unet import UNet2DConditionModel, UNetConfig
from digseg_jax.prediction.description import describe
from digseg_jax.report import build_report, class_colors, overlay, paint, write_gallery
from digseg_jax.report.cards import load_image
from digseg_jax.report.circumstances import training_hours
from digseg_jax.report.confusions import confusions
from digseg_jax.viz.colors import IGNORE_COLOR, NATURAL, seen_lab, separation, to_hex
from digseg_jax.viz.gallery import GalleryItem
from digseg_jax.viz.templates import render_part

VOID = {"meta", "link", "img", "input", "line", "circle", "br"}


class Page(HTMLParser):
    """Collects elements, ids, text and the unrounded values of <data>; checks the nesting."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.values, self.words = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "data":
            self.values.append(float(dict(attrs)["value"]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if not {"script", "style"} & set(self.open):
            self.words.append(text)

    def ids(self):
        return [a["id"] for _, a in self.elements if "id" in a]

    def all(self, tag, **attrs):
        return [a for t, a in self.elements if t == tag and attrs.items() <= a.items()]


def html(workdir) -> str:
    return build_report(workdir).read_text(encoding="utf-8")


def page(workdir):
    return Page(html(workdir))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "quickstart", images=3)


def minimal(workdir, **changes):
    dump(workdir / "eval" / "results.json", results(**changes))
    return workdir


def test_every_part_is_there_once(run):
    ids = page(run).ids()
    assert len(ids) == len(set(ids))
    assert {
        "scores",
        "text",
        "gallery",
        "classes",
        "confusions",
        "training",
        "estep",
        "bench",
        "run",
    } <= set(ids)


def test_numbers_are_those_of_the_files(run):
    values = page(run).values
    wanted = results()
    names = ("miou", "accuracy", "absent_rate", "matching_iou", "wrong_query_iou", "num_images")
    expected = [wanted[name] for name in names]
    expected += [v for v in wanted["per_class"].values() if v is not None]
    estep = json.loads((run / "eval" / "estep.json").read_text())
    expected += [row["queries_per_second"] for row in estep["rows"]]
    gallery = json.loads((run / "eval" / "gallery" / "gallery.json").read_text())
    for item in gallery["items"]:
        expected += [item["miou"], *(q["iou"] for q in item["queries"] if q["iou"] is not None)]
    assert not [v for v in expected if v not in values]


def test_rounded_numbers_agree_with_their_values(run):
    text = build_report(run).read_text()
    pairs = re.findall(r'<data value="([^"]+)"[^>]*>([\d.,]+)( %)?</data>', text)
    assert len(pairs) > 30
    for value, shown, unit in pairs:
        digits = len(shown.partition(".")[2])
        scale = 100 if unit else 1
        assert abs(float(value) * scale - float(shown.replace(",", ""))) <= 0.5001 * 10**-digits


def test_the_page_needs_nothing_but_itself(run):
    found = page(run)
    links = [a[k] for _, a in found.elements for k in ("src", "href") if k in a]
    assert links
    assert all(link.startswith("data:") for link in links)
    text = build_report(run).read_text()
    assert not re.search(r"https?://|@import|url\(", text)
    assert "default-src 'none'" in text


def test_every_image_has_a_text_and_every_slider_a_value(run):
    found = page(run)
    assert all(a["alt"] for a in found.all("img"))
    sliders = found.all("div", role="slider")
    assert len(sliders) == 3
    assert all(s["aria-valuenow"] == "50" and s["tabindex"] == "0" for s in sliders)
    assert len({s["aria-label"] for s in sliders}) == 3


def words(workdir) -> str:
    return " ".join(" ".join(page(workdir).words).split())


@pytest.fixture(scope="module")
def product(cover, folders, tmp_path_factory):
    """A run of the program itself, as small as can be."""
    config = tiny.config(folders, train__steps=1, eval__num_images=1, eval__sweep=("1x1",))
    workdir = tmp_path_factory.mktemp("product")
    jobs.train(config, workdir)
    return workdir


def test_the_page_says_what_is_true_of_the_weights_that_were_scored(product):
    tensors = load_file(product / "export" / "unet" / "diffusion_pytorch_model.safetensors")
    count = sum(tensor.size for tensor in tensors.values())
    said = words(product)
    assert "Measured by this run on the test split of landcover (seed 0)." in said
    assert f"The model has {count:,} trained parameters." in said
    assert "Its weights were trained on landcover, for 1 step, from " in said
    assert "(checkpoints/1)" in said
    assert "small" not in said.partition("Does it listen")[0] and "compare" not in said
    queries = json.loads((product / "eval" / "results.json").read_text())["queries"]
    assert queries == list(GROUPS) and all(f"<li>{q}</li>" in html(product) for q in queries)
    note = json.loads((product / "eval" / "estep.json").read_text())["note"]
    assert note == "Measured by this run on the test split of landcover."


def test_the_page_says_the_size_of_stable_diffusion(product, folders, tmp_path):
    """Its parameters counted from their shapes, on the page of the same run."""
    config = UNetConfig(in_channels=8)
    _, abstract = functional.abstract(lambda: UNet2DConditionModel(config, rngs=functional.FixedRngs()))
    large = describe(tiny.config(folders), abstract, 30_000, "checkpoints/30000")
    results = json.loads((product / "eval" / "results.json").read_text())
    dump(tmp_path / "eval" / "results.json", results | {"weights": large.provenance()})
    said = words(tmp_path)
    # diffusers' 859,520,964 and a first convolution that sees four more channels
    assert f"The model has {859_520_964 + 320 * 4 * 9:,} trained parameters." in said
    assert "small" not in said and "for 30,000 steps" in said


def test_weights_of_another_data_set_are_said_to_be(tmp_path):
    workdir = minimal(tmp_path, weights=weights(datasets=["coco_stuff", "camvid"]))
    assert "trained on coco_stuff, camvid, not on this data set" in words(workdir)


def test_a_users_own_folder_is_called_by_its_name(tmp_path):
    workdir = minimal(tmp_path, dataset="folder", weights=weights(datasets=["folder"]))
    dump(workdir / "config.json", {"data": {"root": "/home/me/my leaves/"}})
    assert "my leaves" in page(workdir).words
    said = words(workdir)
    assert "split of my leaves (seed" in said and "trained on my leaves, for" in said


def test_what_is_not_recorded_is_not_said(tmp_path):
    old = results()
    del old["weights"]
    dump(tmp_path / "eval" / "results.json", old)
    said = words(tmp_path)
    assert "Measured by this run" in said
    assert "trained" not in said.partition("Does it listen")[0]


@pytest.mark.parametrize(
    ("decoder", "rule", "expected"),
    [
        ("latent_mean", "mean", "the mean of their latents is decoded"),
        ("vae", "mean", "their probabilities are averaged"),
        ("vae", "median", "the median of their probabilities counts"),
        ("probe", "vote", "the share of them that chose the query counts"),
    ],
)
def test_the_page_says_how_members_became_one_answer(tmp_path, decoder, rule, expected):
    dump(tmp_path / "eval" / "results.json", results(decoder=decoder, ensemble_rule=rule))
    assert expected in words(tmp_path)


def test_made_up_results_have_no_key_that_the_program_does_not_write(product):
    real = json.loads((product / "eval" / "results.json").read_text())
    assert results().keys() <= real.keys()
    assert weights().keys() == real["weights"].keys()


def test_absent_parts_are_left_out(tmp_path):
    bare = results(per_class={}, queries=[])
    for name in ("accuracy", "absent_rate", "matching_iou", "wrong_query_iou", "weights"):
        del bare[name]
    dump(tmp_path / "eval" / "results.json", bare)
    assert [i for i in page(tmp_path).ids() if not i.endswith("-title")] == ["scores"]


def test_a_short_or_broken_loss_curve_is_no_error(tmp_path):
    minimal(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n{"step": 2, "loss": 0.0}\n')
    assert "training" not in page(tmp_path).ids()
    same = "".join(json.dumps({"step": i, "loss": 0.5}) + "\n" for i in range(3))
    (tmp_path / "metrics.jsonl").write_text(same + '{"step": 3, "lo')
    assert "training" in page(tmp_path).ids()


def test_names_are_escaped(tmp_path):
    evil = '<script>alert("x")</script>&\'{{script}}'
    facts = weights(datasets=[evil], started_from=evil, checkpoint=evil)
    minimal(tmp_path, dataset=evil, split=evil, protocol=evil, per_class={evil: 0.5},
            queries=[evil], seed=evil, weights=facts)  # fmt: skip
    item = make_item(1, 16)
    item = GalleryItem(evil, item.image, item.label, item.prediction, item.masks, (evil,) * 8,
                       item.ious, kind=evil)  # fmt: skip
    write_gallery(tmp_path / "eval" / "gallery", [item], [evil + str(i) for i in range(8)])
    dump(tmp_path / "bench" / "a.json",
         {"title": evil, "columns": [evil], "rows": [[evil]], "note": evil})  # fmt: skip
    dump(tmp_path / "eval" / "estep.json", {"rows": [{"spacing": evil}], "note": evil})
    dump(tmp_path / "config.json", {evil: evil})
    found = page(tmp_path)
    assert len(found.all("script")) == 1
    assert not any(name.startswith("on") for _, a in found.elements for name in a)
    assert sum(evil in word for word in found.words) >= 10


def test_no_results_names_the_command(tmp_path):
    with pytest.raises(UserError, match=f"--workdir={tmp_path} --mode=eval") as error:
        build_report(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("eval/results.json", "{", "not readable as JSON"),
        ("eval/results.json", "[]", "holds list, expected an object"),
        pytest.param("eval/results.json", "[" * 100_000, "nested too deep", id="deep"),
        ("eval/results.json", "{}", "lacks dataset"),
        ("bench/a.json", '{"title": "x"}', "lacks columns, rows"),
        ("eval/gallery/gallery.json", '{"items": [{"id": "a"}]}', "expected form"),
        ("eval/gallery/gallery.json", '{"classes": [{"name": "a", "color": "red;"}]}', "#rrggbb"),
        ("eval/gallery/gallery.json", '{"items": [{"id": "a", "image": "../a"}]}', "plain name"),
        ("eval/gallery/gallery.json", '{"items": [{"id": "a", "image": "a.png"}]}', "not a PNG"),
        ("eval/estep.json", '{"rows": 3}', "expected form"),
    ],
)
def test_a_bad_file_is_named(tmp_path, path, text, message):
    minimal(tmp_path)
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(text)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        build_report(tmp_path)
    assert "\n" not in str(error.value)


def test_nan_in_results_is_no_number(tmp_path):
    minimal(tmp_path, accuracy=float("nan"))
    assert "Pixel accuracy" not in page(tmp_path).words


def test_the_gallery_holds_what_went_in(tmp_path):
    item = make_item(2, 32)
    saved = json.loads(write_gallery(tmp_path, [item], CLASSES).read_text())
    (row,) = saved["items"]
    assert row["image"] == "0000_image.png"
    assert [q["mask"] for q in row["queries"]][:2] == ["0000_mask_0.png", "0000_mask_1.png"]
    assert saved["classes"][0] == {"name": "water", "color": NATURAL["water"]}
    np.testing.assert_array_equal(Image.open(tmp_path / row["image"]), item.image)
    index = np.asarray(Image.open(tmp_path / row["label"])).astype(int)
    np.testing.assert_array_equal(np.where(index == 255, -1, index), item.label)
    painted = np.asarray(Image.open(tmp_path / row["label"]).convert("RGB"))
    np.testing.assert_array_equal(painted, paint(item.label, class_colors(8, CLASSES)))
    mask = np.asarray(Image.open(tmp_path / "0000_mask_3.png")) / 255
    np.testing.assert_allclose(mask, item.masks[3], atol=0.5 / 255 + 1e-9)
    assert row["miou"] == pytest.approx(np.mean([i for i in item.ious if i is not None]))
    assert set(row["classes"]) == {CLASSES[c] for c in np.union1d(item.label, item.prediction)
                                   if c >= 0}  # fmt: skip


def test_a_new_gallery_replaces_the_old_one(tmp_path):
    write_gallery(tmp_path, [make_item(0, 16), make_item(1, 16)], CLASSES)
    write_gallery(tmp_path, [make_item(0, 16)], CLASSES)
    assert not list(tmp_path.glob("0001_*"))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": np.zeros((3, 3), np.int32)}, "differ in shape"),
        ({"queries": ("water",)}, "must be equal"),
        ({"masks": np.zeros((16, 16))}, "must be [queries, h, w]"),
        ({"label": np.full((16, 16), 9)}, "legal are 0..7"),
        ({"image": np.zeros((16, 16, 3))}, "must be uint8"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, change, message):
    fields = {**make_item(0, 16).__dict__, **change}
    with pytest.raises(UserError, match=re.escape(message)):
        write_gallery(tmp_path, [GalleryItem(**fields)], CLASSES)


def test_more_classes_than_a_palette_holds(tmp_path):
    label = np.arange(300, dtype=np.int32).reshape(15, 20)
    item = GalleryItem("many", np.zeros((15, 20, 3), np.uint8), label, label, np.zeros((0, 15, 20)),
                       (), ())  # fmt: skip
    write_gallery(tmp_path, [item], [f"class {i}" for i in range(300)])
    picture = np.asarray(Image.open(tmp_path / "0000_label.png").convert("RGB"))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) == 300


def test_land_cover_has_natural_colors_that_everyone_can_tell_apart():
    colors = class_colors(8, CLASSES)
    assert [to_hex(c) for c in colors] == [NATURAL[name] for name in CLASSES]
    red, green, blue = colors[CLASSES.index("water")].astype(int)
    assert blue > green > red
    red, green, blue = colors[CLASSES.index("forest")].astype(int)
    assert green > max(red, blue)
    apart = separation(colors, colors) + 1000 * np.eye(8)
    assert apart.min() > 19  # CIELAB, in the worst of three kinds of color vision


@pytest.mark.parametrize(("n", "least"), [(1, 0), (8, 15), (19, 15), (60, 7), (150, 4), (847, 0.5)])
def test_colors_of_any_number_of_classes(n, least):
    colors = class_colors(n)
    assert colors.shape == (n, 3)
    assert colors.dtype == np.uint8
    everything = np.concatenate([colors, [IGNORE_COLOR]]).astype(np.uint8)
    assert len(np.unique(everything, axis=0)) == n + 1
    assert (separation(everything, everything) + 1000 * np.eye(n + 1)).min() > least
    np.testing.assert_array_equal(colors, class_colors(n))


def test_classes_beyond_the_colors_that_differ_have_them_again():
    names = [f"class {i}" for i in range(2003)]
    colors = class_colors(2003, names, [None] * 2003)
    assert len(np.unique(colors[:2000], axis=0)) == 2000
    np.testing.assert_array_equal(colors[2000:], colors[:3])


def test_a_background_is_pale_and_its_things_are_not():
    colors = class_colors(6, ["background", "crop", "weed", "nucleus", "crack", "road"])
    lightness = seen_lab(colors)[0, :, 0]
    assert lightness[0] > 80 and np.abs(seen_lab(colors)[0, 0, 1:]).max() < 5
    assert (separation(colors, colors) + 1000 * np.eye(6)).min() > 15


def test_two_words_for_one_group_still_differ():
    colors = class_colors(3, ["water", "ocean", "lava"])
    assert to_hex(colors[0]) == NATURAL["water"]
    assert len(np.unique(colors, axis=0)) == 3


def test_classes_have_their_official_colors_and_all_differ():
    cityscapes = registry.spec("cityscapes")
    assert class_colors(19, cityscapes.names, cityscapes.colors)[0].tolist() == [128, 64, 128]
    for name in ("ade20k", "camvid", "coco_stuff", "pascal_voc_21"):
        spec = registry.spec(name)
        colors = [tuple(c) for c in class_colors(spec.num_classes, spec.names, spec.colors).tolist()]
        assert len({*colors, IGNORE_COLOR}) == spec.num_classes + 1, name
        own = [c == o for c, o in zip(colors, spec.colors, strict=True) if o]
        assert sum(own) >= len(own) - 1, name  # one of ADE20K twice; CamVid's and VOC's gray
    assert registry.official_colors(["road", "giraffe"], ["folder", "cityscapes"])[1] is None
    assert registry.official_colors(["sky"], ["cityscapes", "ade20k"]) == ((70, 130, 180),)


def test_the_confusions_are_those_of_the_counts(run):
    found = page(run).words
    start = found.index("Most frequent mistakes")
    named = [w.strip() for w in found[start:] if w.strip() in CLASSES]
    assert named[:2] == ["urban", "cropland"]
    counts = np.array(results()["confusion"])
    assert any(abs(v - 100 * counts[5, 3] / counts[5].sum()) < 1e-9 for v in page(run).values)
    section = render_part("report/sections.html.j2", "confusions", confusions(results(), {}))
    assert len(Page(section).all("td")) == 1 + 8 * 9 + 4 * 12
    cut = results(per_class={f"class {i}": 0.5 for i in range(40)}, confusion=np.eye(40, 41).tolist())
    assert confusions(cut, {}) is None  # nothing is wrong
    assert confusions(results(confusion=None), {}) is None


def test_the_page_tells_when_where_and_how_long(run):
    said = words(run)
    assert "2026-01-02 03:04+00:00 on 4 x TPU v5 lite" in said and "jax 0.10.0" in said
    assert "digseg --config=quickstart --workdir=runs/quickstart" in said
    lines = [{"step": 10, "images_per_second": 2.0}, {"step": 30, "images_per_second": 4.0}]
    config = {"train": {"batch_size": 8}}
    assert training_hours(lines, config) == pytest.approx((10 * 8 / 2 + 20 * 8 / 4) / 3600)
    assert training_hours(lines, None) is None and training_hours([], config) is None


def test_typical_images_come_first(run):
    cards = page(run).all("article")
    assert [c["data-kind"] for c in cards] == ["worst", "best", ""]
    assert [c["data-index"] for c in cards] == ["1", "2", "0"]


@pytest.mark.usefixtures("unchecked")
def test_overlay_mixes_and_leaves_ignored_pixels():
    image = np.full((1, 2, 3), 100, np.uint8)
    mixed = overlay(image, np.array([[0, -1]]), np.array([[200, 0, 100]], np.uint8), alpha=0.25)
    assert mixed.tolist() == [[[125, 75, 100], [100, 100, 100]]]
    with pytest.raises(UserError, match="does not fit"):
        overlay(image, np.zeros((2, 2), int), np.zeros((1, 3), np.uint8))


def test_images_go_into_the_page_small_and_classes_keep_their_exact_colors(tmp_path):
    rng = np.random.default_rng(0)
    smooth = np.asarray(Image.fromarray(rng.integers(0, 256, (6, 9, 3), np.uint8)).resize((180, 120)))
    colors = np.array([(1, 2, 3), (250, 9, 77)], np.uint8)[rng.integers(0, 2, (120, 180))]
    for name, pixels in (("photo", smooth), ("labels", colors), ("mask", smooth[..., 0])):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")

    def shown(kind):
        uri, width, height = load_image(tmp_path, f"{kind}.png", kind)
        assert (width, height) == (180, 120) and uri.startswith("data:image/webp;base64,")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))

    np.testing.assert_array_equal(shown("labels"), colors)
    assert shown("mask").shape == (60, 90, 3)
    assert np.abs(shown("photo").astype(int) - smooth).mean() < 6
    assert len(load_image(tmp_path, "photo.png", "photo")[0]) < (tmp_path / "photo.png").stat().st_size
