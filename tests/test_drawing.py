"""Pictures: every edge and layer is there, nothing overlaps; a file is whole or not there."""

import concurrent.futures
import itertools
import re
import xml.etree.ElementTree

import jax
import jax.numpy as jnp
import matplotlib.colors
import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest
from flax import linen
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot
from matplotlib.text import Text

import archscale_jax as archscale
from archscale_jax._architecture import Architecture, Parameter, Role
from archscale_jax._draw import MAX_NAME, MAX_VERTICES, draw
from archscale_jax._draw.layout import Line, arrange
from archscale_jax._draw.styles import DEAD_COLOR, EDGE_STYLES
from archscale_jax._graph import Operator, build_graph, is_weight, live_edges, live_vertices
from archscale_jax._spaces import chain_string, random_dag_string, random_sparse_dag
from experiments.lab.gallery import IMAGES, TOKENS, ResNet, TransformerBlock, traced

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class LanguageModel(linen.Module):
    depth: int = 1
    width: int = 512

    @linen.compact
    def __call__(self, tokens):
        table = linen.Embed(1000, self.width, name="tokens")
        normal = linen.initializers.normal()
        x = table(tokens) + self.param("positions", normal, (64, self.width))
        for index in range(self.depth):
            x = TransformerBlock(self.width, name=f"block{index}")(x)
        return table.attend(linen.LayerNorm(name="norm")(x))


class Inception(linen.Module):
    @linen.compact
    def __call__(self, x):
        def layer(x, name, features, size):
            x = linen.Conv(features, (size, size), name=name)(x)
            return linen.relu(linen.LayerNorm(name=f"{name}_normalization")(x))

        x = layer(x, "stem", 8, 3)
        pooled = linen.avg_pool(x, (3, 3), padding="SAME")
        branches = [
            layer(x, "one", 4, 1),
            layer(layer(x, "reduce", 2, 1), "five", 4, 5),
            layer(pooled, "project", 4, 1),
        ]
        x = jnp.concatenate(branches, axis=-1)
        return linen.Dense(10, name="head")(x.mean((1, 2)))


def by_hand(graph, name="edges/{}/kernel"):
    """An architecture of 16 features on every vertex of a graph."""
    parameters = [
        Parameter("stem/kernel", Role.INPUT, Role.INPUT, (3, 16), 3, 16),
        Parameter("stem/bias", Role.BIAS, Role.INPUT, (16,), 16, 16),
    ]
    sizes = graph.edges["kernel_size"].tolist()
    for edge in np.flatnonzero(is_weight(graph)).tolist():
        q = sizes[edge]
        shape, fan = (q, q, 16, 16), 16 * q * q
        parameters.append(
            Parameter(
                name.format(edge), Role.HIDDEN, Role.HIDDEN, shape, fan, fan, q, q * q, edge=edge
            )
        )
    parameters.append(Parameter("readout", Role.READOUT, Role.READOUT, (16, 10), 16, 10))
    return Architecture(graph, tuple(parameters))


def scanned():
    sizes = {"stem": (8, 16), "stack": (2, 16, 16), "shared": (16, 16), "out": (16, 3)}

    def apply(params, x):
        def layer(z, kernel):
            return z + jax.nn.relu(z) @ kernel, None

        z, _ = jax.lax.scan(layer, x @ params["stem"], params["stack"])
        z = jax.nn.relu(jax.nn.relu(z) @ params["shared"]) @ params["shared"]
        return jax.nn.relu(z) @ params["out"]

    params = {name: jax.ShapeDtypeStruct(size, jnp.float32) for name, size in sizes.items()}
    return archscale.trace(apply, params, jax.ShapeDtypeStruct((2, 8), jnp.float32))


PARALLEL = build_graph(
    3, [0, 0, 1, 1, 1, 0], [1, 1, 2, 2, 2, 2], [2, 1, 3, 3, 1, 4], [1, 1, 3, 5, 1, 3]
)
MODELS = {
    "resnet": lambda: traced(ResNet((2, 1)), IMAGES),
    "language": lambda: traced(LanguageModel(2), TOKENS),
    "inception": lambda: traced(Inception(), IMAGES),
    "scanned": scanned,
    "parallel": lambda: by_hand(PARALLEL),
    "dead": lambda: by_hand(archscale.dag_graph("2_00_210_0100_20001")),
    "dense": lambda: by_hand(archscale.dag_graph(random_dag_string(1, 9))),
    "sparse": lambda: by_hand(random_sparse_dag(0, 20, 35)),
    "long": lambda: by_hand(archscale.dag_graph("2_02_212"), "a$b$" + "folder/" * 40 + "{}"),
    "bare": lambda: Architecture(archscale.dag_graph("2_02_212"), ()),
    "cell": lambda: Architecture(archscale.cell_graph("3_34_131"), ()),
    "mixed": lambda: Architecture(
        build_graph(4, [0, 1, 2, 0], [1, 2, 3, 3], [2, 3, 4, 1], [1, 7, 3, 1]), ()
    ),
    "joins": lambda: Architecture(
        build_graph(5, [0, 0, 1, 2, 1, 3], [1, 2, 3, 3, 4, 4], [2, 2, 6, 6, 5, 5]), ()
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def picture(request):
    """An architecture and its figure, whose texts are laid out."""
    architecture = MODELS[request.param]()
    figure = draw(architecture, title="A title")
    figure.canvas.draw()
    return architecture, figure


def artists(figure, pattern):
    found = {}
    for artist in figure.findobj():
        if re.fullmatch(pattern, artist.get_gid() or ""):
            assert artist.get_gid() not in found
            found[artist.get_gid()] = artist
    return found


def lines(figure):
    return artists(figure, r"(edge|stem|readout)-[\d-]+")


def edge_names(graph):
    """Group ids as they are documented."""
    pairs = list(zip(graph.senders.tolist(), graph.receivers.tolist(), strict=True))
    for index, (sender, receiver) in enumerate(pairs):
        rank = pairs[:index].count((sender, receiver))
        yield f"edge-{sender}-{receiver}" + (f"-{rank}" if rank else "")


def layer_name(figure, line):
    """The full name of a layer, whose folder is a text of its own."""
    found = artists(figure, f"(folder|name)-{line}")
    return "".join(found[gid].get_text() for gid in sorted(found))


def rows(figure):
    """(name, what it computes) of all layers, from the top."""
    texts = artists(figure, "text-.*")
    order = sorted(texts, key=lambda gid: texts[gid].get_position()[1])
    return [(layer_name(figure, gid.removeprefix("text-")), texts[gid].get_text()) for gid in order]


def shown_texts(figure):
    return [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]


def points_of(line):
    """Points [N, 2] close together on a line of the picture."""
    (corners,) = line.get_path().to_polygons(closed_only=False)
    return np.concatenate(
        [
            np.linspace(start, end, 1 + int(np.hypot(*(end - start)) / 0.01), endpoint=False)
            for start, end in itertools.pairwise(corners)
        ]
        + [corners[-1:]]
    )


def test_every_edge_is_a_line_in_its_style_between_its_vertices(picture):
    architecture, figure = picture
    graph = architecture.graph
    circles, found = artists(figure, r"vertex-\d+"), lines(figure)
    assert [*circles] == [f"vertex-{vertex}" for vertex in graph.nodes]
    names = list(edge_names(graph))
    assert {gid for gid in found if gid.startswith("edge")} == set(names)
    columns = (graph.senders, graph.receivers, graph.edges["operator"], live_edges(graph))
    for gid, sender, receiver, operator, alive in zip(names, *columns, strict=True):
        style, line = EDGE_STYLES[operator], found[gid]
        expected = style.color if alive else DEAD_COLOR
        assert matplotlib.colors.to_hex(line.get_edgecolor()) == expected
        assert line.get_linestyle() == style.line_style
        points = points_of(line)
        np.testing.assert_allclose(points[0], circles[f"vertex-{sender}"].center, atol=1e-9)
        np.testing.assert_allclose(points[-1], circles[f"vertex-{receiver}"].center, atol=1e-9)
        assert np.all(np.diff(points[:, 1]) >= -1e-9)  # downwards
    for circle, alive in zip(circles.values(), live_vertices(graph), strict=True):
        grey = matplotlib.colors.to_hex(circle.get_edgecolor()) == DEAD_COLOR
        assert grey == (not alive)


def test_no_line_passes_through_a_vertex_or_a_mark_that_is_not_its_own(picture):
    _, figure = picture
    circles = artists(figure, r"vertex-\d+|input|output")
    marks = artists(figure, "mark-.*")
    for gid, line in lines(figure).items():
        points = points_of(line)
        for circle in circles.values():
            distances = np.hypot(*(points - circle.center).T)
            assert distances[[0, -1]].min() < 1e-6 or distances.min() > circle.radius
        for name, mark in marks.items():
            box = mark.get_path().get_extents()
            touches = np.all((points > box.min) & (points < box.max), axis=1).any()
            assert touches == (name == f"mark-{gid}")


def test_texts_neither_overlap_nor_leave_the_figure(picture):
    _, figure = picture
    boxes = [text.get_window_extent() for text in shown_texts(figure)]
    for index, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
        shrunk = [other.padded(-0.5) for other in boxes[:index]]  # of a pixel
        assert box.padded(-0.5).count_overlaps(shrunk) == 0


def test_lines_stand_beside_the_texts(picture):
    _, figure = picture
    right = max(line.get_window_extent().x1 for line in lines(figure).values())
    texts = artists(figure, "(folder|name|text)-.*")
    assert all(text.get_window_extent().x0 > right for text in texts.values())


def test_every_layer_is_named_at_each_of_its_edges(picture):
    architecture, figure = picture
    names = list(edge_names(architecture.graph))
    outer = [layer_name(figure, gid) for gid in lines(figure) if not gid.startswith("edge")]
    for leaf in architecture.parameters:
        edges = [edge for edge in (leaf.edge, *leaf.further_edges) if edge is not None]
        for edge in edges:
            found = re.sub(r"\[\d+\]$", "", layer_name(figure, names[edge]))
            start, _, end = found.partition("…")
            assert found
            assert leaf.name.startswith(start)
            assert end in leaf.name
            assert len(found) <= MAX_NAME
        if not edges and leaf.layer in ("input", "readout"):
            assert any(leaf.name.startswith(name) for name in outer)


def test_a_residual_network():
    figure = draw(traced(ResNet((1, 1)), IMAGES))
    assert rows(figure) == [
        ("conv1", "3×3 convolution, 3→64"),
        ("layer1_block0/conv1", "3×3 convolution, 64→64"),
        ("layer1_block0/conv2", "3×3 convolution, 64→64"),
        ("layer2_block0/conv1", "3×3 convolution, 64→128"),
        ("layer2_block0/conv2", "3×3 convolution, 128→128"),
        ("layer2_block0/shortcut", "1×1 convolution, 64→128"),
        ("head", "linear 128→10"),
    ]
    # The chain is straight, the skip and the projection are on its left.
    sides = {gid: np.ptp(points_of(line)[:, 0]) for gid, line in lines(figure).items()}
    assert {gid for gid, side in sides.items() if side > 0} == {"edge-0-2", "edge-2-4"}
    assert all(points_of(lines(figure)[gid])[:, 0].max() <= 0 for gid in ("edge-0-2", "edge-2-4"))
    (note,) = artists(figure, "note").values()
    assert note.get_text().startswith("at vertices: layer1_block0/conv1_norm, ")


def test_a_transformer_block():
    figure = draw(traced(LanguageModel(), TOKENS))
    assert rows(figure) == [
        ("tokens", "embedding 1000→512, shared"),
        ("positions", "embedding 64×512"),
        ("block0/attention/query", "linear 512→512"),
        ("block0/attention/key", "linear 512→512"),
        ("block0/attention/value", "linear 512→512"),
        ("block0/attention/out", "linear 512→512"),
        ("block0/mlp_in", "linear 512→2048"),
        ("block0/mlp_out", "linear 2048→512"),
        ("tokens", "linear 512→1000, shared"),
    ]
    centers = {gid: x.center[0] for gid, x in artists(figure, r"vertex-\d").items()}
    assert [vertex for vertex, x in centers.items() if x > 0] == ["vertex-2", "vertex-3"]
    lefts = {gid for gid, line in lines(figure).items() if points_of(line)[:, 0].min() < 0}
    assert lefts == {"stem-1", "edge-0-6", "edge-6-8"}
    (mark,) = artists(figure, "mark-stem-1").values()  # nothing leads into added positions
    assert mark.get_path().get_extents().contains(*points_of(lines(figure)["stem-1"])[0])
    (note,) = artists(figure, "note").values()
    assert note.get_text() == "at vertices: block0/norm1, block0/norm2, norm"


def test_stacked_and_shared_weights():
    assert rows(draw(scanned())) == [
        ("stem", "linear 8→16"),
        ("stack[0]", "linear 16→16"),
        ("stack[1]", "linear 16→16"),
        ("shared", "linear 16→16, shared"),
        ("shared", "linear 16→16, shared"),
        ("out", "linear 16→3"),
    ]


@pytest.mark.parametrize(
    ("sizes", "options", "text"),
    [
        ((3, 3), {}, "3×3 convolution, 8→16"),
        ((3, 3), {"feature_group_count": 4}, "3×3 convolution, 8→16, 4 groups"),
        ((5,), {}, "5-wide convolution, 8→16"),
        ((3, 3, 3), {}, "3×3×3 convolution, 8→16"),
        ((3, 5), {}, "15-point convolution, 8→16"),
    ],
)
def test_convolutions_of_any_kind(sizes, options, text):
    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.relu(linen.Conv(8, sizes)(x))
            return linen.Dense(3)(linen.relu(linen.Conv(16, sizes, **options)(x)))

    figure = draw(traced(Model(), jnp.ones((1, *(6 for _ in sizes), 2))))
    assert rows(figure)[1] == ("Conv_1", text)


def test_the_kinds_of_edges_differ_in_colour_and_in_line_style():
    kinds = [style for kind, style in EDGE_STYLES.items() if kind != Operator.LINEAR]
    assert len({style.color for style in kinds} | {DEAD_COLOR}) == 6
    assert len({style.line_style for style in kinds}) == 5
    assert EDGE_STYLES.keys() == set(Operator) - {Operator.ZERO}


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("bare", ["linear", "skip"]),
        ("cell", ["convolution", "skip", "average pooling"]),
        ("dead", ["linear", "skip", "on no path"]),
        ("mixed", ["linear, convolution", "skip", "average pooling"]),
        ("joins", ["linear", "concatenation", "product"]),
    ],
)
def test_the_legend_names_what_is_there(name, texts):
    legend = draw(MODELS[name]()).axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == texts


def test_a_graph_is_drawn_with_its_kernel_sizes():
    graph = MODELS["mixed"]().graph
    assert rows(draw(graph)) == [
        ("", "linear"),
        ("", "7×7 convolution"),
        ("", "3×3 average pool"),
    ]


def test_pools_are_named_by_what_they_are():
    assert ("", "3×3 average pool") in rows(draw(traced(Inception(), IMAGES)))


def test_layers_that_share_a_folder_are_told_apart():
    graph = archscale.dag_graph("2_02")
    parameters = (
        Parameter("block/w1", Role.HIDDEN, Role.HIDDEN, (4, 4), 4, 4, edge=0),
        Parameter("block/b1", Role.BIAS, Role.HIDDEN, (4,), 4, 4, edge=0),
        Parameter("block/w2", Role.HIDDEN, Role.HIDDEN, (4, 4), 4, 4, edge=1),
        Parameter("other/w", Role.READOUT, Role.READOUT, (4, 4), 4, 4),
    )
    found = [name for name, _ in rows(draw(Architecture(graph, parameters)))]
    assert found == ["block/w1", "block/w2", "other"]


def test_what_is_on_no_path_is_grey():
    architecture = MODELS["dead"]()
    figure = draw(architecture)
    live = live_edges(architecture.graph)
    for gid, alive in zip(edge_names(architecture.graph), live, strict=True):
        for artist in artists(figure, f"(name|text)-{gid}").values():
            assert (artist.get_color() == DEAD_COLOR) == (not alive)
    assert not live.all()


def test_a_long_title_widens_the_figure():
    architecture = MODELS["bare"]()
    plain, titled = draw(architecture), draw(architecture, title="A long title, " * 5 + "\nof two")
    assert titled.get_size_inches()[0] > plain.get_size_inches()[0]
    (title,) = artists(titled, "title").values()
    box = title.get_window_extent()
    assert titled.bbox.x0 <= box.x0 < box.x1 <= titled.bbox.x1
    assert titled.bbox.y0 <= box.y0 < box.y1 <= titled.bbox.y1


GRAPHS = st.integers(2, 9).flatmap(
    lambda size: st.tuples(
        st.just(size),
        st.lists(
            st.tuples(st.integers(0, size - 1), st.integers(0, size - 1), st.booleans()).filter(
                lambda line: line[0] < line[1]
            ),
            max_size=14,
        ),
    )
)


@given(GRAPHS)
def test_lines_have_their_lanes_to_themselves(drawn):
    size, rows = drawn
    lines = [Line(*row, marked=row[2]) for row in rows]
    lines += [Line(vertex, vertex + 1, False, False) for vertex in range(0, size - 1, 2)]
    lines.append(Line(0, size - 1, False, False))
    layout = arrange(size, lines)
    order = {row: place for place, row in enumerate(layout.rows)}
    marks = [("line", index) for index, line in enumerate(lines) if line.marked]
    assert sorted(order) == sorted([*marks, *(("vertex", vertex) for vertex in range(size))])
    heights = [order["vertex", vertex] for vertex in range(size)]
    assert heights == sorted(heights)
    spans = [(heights[line.sender], heights[line.receiver]) for line in lines]
    for index, (start, end) in enumerate(spans):
        assert all(start < order[mark] < end for mark in marks if mark == ("line", index))
        for vertex, height in enumerate(heights):
            assert not start < height < end or layout.columns[vertex] != layout.lanes[index]
        for other in range(index):
            apart = spans[other][0] >= end or spans[other][1] <= start
            assert apart or layout.lanes[other] != layout.lanes[index]
    straight = [index for index, lane in enumerate(layout.lanes) if lane == 0]
    straight.sort(key=lambda index: lines[index].sender)
    assert [lines[index].sender for index in straight][:1] == [0]
    assert sum(lines[index].weight for index in straight) == _most_weights(size, lines)


def _most_weights(size, lines):
    """By brute force over all paths."""

    def most(vertex):
        onward = [line.weight + most(line.receiver) for line in lines if line.sender == vertex]
        return 0 if vertex == size - 1 else max(onward, default=-(10**9))

    return most(0)


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".svg"])
def test_files(tmp_path, suffix):
    path = tmp_path / "new" / f"architecture{suffix}"
    draw(MODELS["parallel"](), str(path), title="A title")
    assert [*path.parent.iterdir()] == [path]
    content = path.read_bytes()
    if suffix == ".svg":
        root = xml.etree.ElementTree.fromstring(content)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert {element.get("id") for element in root.iter()} >= set(edge_names(PARALLEL))
        for text in ("input", "output", "A title", "skip"):
            assert f"<!-- {text} -->" in content.decode()
    else:
        assert content.startswith(PNG_SIGNATURE)
        assert matplotlib.image.imread(path, format="png").std() > 0.01


def test_an_existing_file_is_replaced(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(b"old")
    draw(MODELS["bare"](), path)
    assert path.read_bytes().startswith(PNG_SIGNATURE)


@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_no_half_file(tmp_path, monkeypatch, old, error):
    def savefig(figure, target):
        target.write_bytes(PNG_SIGNATURE)
        raise error

    path = tmp_path / "picture.png"
    if old is not None:
        path.write_bytes(old)
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    with pytest.raises(type(error)):
        draw(MODELS["bare"](), path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([] if old is None else [old])


@pytest.mark.parametrize("name", ["picture.pdf", "picture", "picture.png.gz", ".png"])
def test_other_suffixes_raise(tmp_path, name):
    with pytest.raises(ValueError, match=rf"one of .png, .svg, found '.*{re.escape(name)}'"):
        draw(MODELS["bare"](), tmp_path / name)
    assert not [*tmp_path.iterdir()]


def test_what_cannot_be_drawn_raises(tmp_path):
    path = tmp_path / "picture.png"
    with pytest.raises(TypeError, match="expected an Architecture, found str"):
        draw("2_02", path)  # pyright: ignore
    graph = archscale.dag_graph(chain_string(MAX_VERTICES))
    with pytest.raises(ValueError, match=f"{MAX_VERTICES + 1} vertices, .* most {MAX_VERTICES}"):
        draw(graph, path)
    bad = graph._replace(edges={**graph.edges, "operator": np.zeros(MAX_VERTICES, np.int32)})
    with pytest.raises(ValueError, match="unknown operator 0"):
        draw(bad, path)
    assert not path.exists()


def test_the_largest_pictures_are_drawn():
    graph = archscale.dag_graph(chain_string(MAX_VERTICES - 1))
    figure = draw(by_hand(graph))
    assert len(artists(figure, r"vertex-\d+")) == MAX_VERTICES


def test_drawing_leaves_pyplot_and_its_settings_alone():
    figures, settings = pyplot.get_fignums(), dict(matplotlib.rcParams)
    draw(MODELS["bare"]())
    assert pyplot.get_fignums() == figures
    assert dict(matplotlib.rcParams) == settings


def test_threads_draw_the_same_pictures_as_one(tmp_path):
    def content(task):
        name, folder = task
        path = tmp_path / folder / f"{name}.png"
        draw(MODELS[name](), path)
        return path.read_bytes()

    names = ["bare", "dead", "joins"]
    alone = [content((name, "alone")) for name in names]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        tasks = [(name, f"thread-{index}") for index in range(2) for name in names]
        assert [*pool.map(content, tasks)] == alone * 2


def test_the_name_of_version_0_1_warns():
    with pytest.warns(DeprecationWarning, match="draw_graph moved to archscale_jax.draw;"):
        assert archscale.draw_graph is draw
