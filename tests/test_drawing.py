"""Pictures of graphs: every edge is drawn once, in its style, and a file is whole or not there."""

import concurrent.futures
import re
import xml.etree.ElementTree

import matplotlib.colors
import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest
from matplotlib import pyplot

from archscale_jax._draw.graph import DEAD_COLOR, EDGE_STYLES, MAX_VERTICES, draw_graph
from archscale_jax._graph import Operator, build_graph, live_edges, live_vertices
from archscale_jax._spaces import (
    cell_graph,
    chain_string,
    dag_graph,
    random_dag_string,
    random_sparse_dag,
)

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
GRAPHS = {
    "two": dag_graph("2"),
    "five": dag_graph("2_02_212_1222"),
    "cell": cell_graph("3_34_131"),
    "chain": dag_graph(chain_string(8), kernel_size=5),
    "twelve": dag_graph(random_dag_string(1, 12), kernel_size=3),
    "dead": dag_graph("2_00_210_0100_20001"),
    "mixed": build_graph(4, [0, 1, 2, 0], [1, 2, 3, 3], [2, 3, 4, 1], [1, 7, 3, 1]),
    "parallel": build_graph(
        5,
        [0, 0, 0, 1, 1, 1, 1, 1, 2, 3, 3],
        [1, 1, 2, 2, 2, 2, 3, 3, 3, 4, 4],
        [2, 1, 3, 3, 3, 4, 2, 1, 3, 2, 2],
        [1, 1, 3, 3, 5, 3, 1, 1, 3, 1, 1],
    ),
    "joins": build_graph(5, [0, 0, 1, 2, 1, 3], [1, 2, 3, 3, 4, 4], [2, 2, 6, 6, 5, 5]),
    "largest": random_sparse_dag(0, MAX_VERTICES, 2 * MAX_VERTICES),
}


@pytest.fixture(params=GRAPHS)
def graph(request):
    return GRAPHS[request.param]


def artists(figure, kind):
    """{(vertex, …): artist} of the group ids `kind-…`; parallel edges have a third number."""
    found = {}
    for artist in figure.findobj():
        name = re.fullmatch(rf"{kind}-([\d-]+)", artist.get_gid() or "")
        if name:
            vertices = tuple(map(int, name[1].split("-")))
            assert vertices not in found
            found[vertices] = artist
    return found


def edge_rows(graph):
    pairs = list(zip(graph.senders.tolist(), graph.receivers.tolist(), strict=True))
    ranks = [pairs[:index].count(pair) for index, pair in enumerate(pairs)]
    return list(
        zip(
            [(*pair, rank) if rank else pair for pair, rank in zip(pairs, ranks, strict=True)],
            map(Operator, graph.edges["operator"].tolist()),
            graph.edges["kernel_size"].tolist(),
            live_edges(graph).tolist(),
            strict=True,
        )
    )


def legend_texts(figure, index=0):
    legend = figure.axes[index].get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


def hex_color(color):
    return matplotlib.colors.to_hex(color)


def test_every_edge_is_drawn_once_in_its_style(graph):
    figure = draw_graph(graph)
    rows = edge_rows(graph)
    shafts, heads = artists(figure, "edge"), artists(figure, "head")
    assert shafts.keys() == heads.keys() == {pair for pair, *_ in rows}
    for pair, operator, _, live in rows:
        style = EDGE_STYLES[operator]
        expected = style.color if live else DEAD_COLOR
        assert hex_color(heads[pair].get_facecolor()) == expected
        assert hex_color(shafts[pair].get_edgecolor()) == expected
        assert shafts[pair].get_facecolor()[3] == 0
        assert shafts[pair].get_linestyle() == style.line_style


def test_weight_edges_arch_above_the_line_and_the_others_below():
    figure = draw_graph(dag_graph("2_02_212_1222"))
    to_data = figure.axes[0].transData.inverted()
    for (sender, receiver), shaft in artists(figure, "edge").items():
        window = to_data.transform_bbox(shaft.get_window_extent())
        operator = {(1, 3): "skip", (0, 4): "skip"}.get((sender, receiver), "linear")
        if receiver - sender == 1:
            assert abs(window.y0) < 0.1 > abs(window.y1)
        elif operator == "linear":
            assert window.y1 > 0.3
            assert window.y0 > 0
        else:
            assert window.y0 < -0.3
            assert window.y1 < 0


def test_arrows_begin_and_end_at_the_rims_of_their_vertices(graph):
    figure = draw_graph(graph)
    circles, heads = artists(figure, "vertex"), artists(figure, "head")
    for pair, shaft in artists(figure, "edge").items():
        sender, receiver, *_ = pair
        first, _, last = shaft.get_path().vertices
        start, end = circles[sender,], circles[receiver,]
        tip = heads[pair].get_xy()[0]
        assert np.hypot(*(first - start.center)) == pytest.approx(start.radius)
        assert end.radius < np.hypot(*(tip - end.center)) < end.radius + 0.05
        assert np.hypot(*(tip - last)) < 0.2


def test_parallel_edges_stand_apart():
    figure = draw_graph(GRAPHS["parallel"])
    tops: dict[tuple[int, int], list[float]] = {}
    for (sender, receiver, *_), shaft in artists(figure, "edge").items():
        top = shaft.get_path().interpolated(50).vertices[:, 1]
        tops.setdefault((sender, receiver), []).append(top[np.abs(top).argmax()])
    for heights in tops.values():
        apart = np.diff(sorted(heights))
        assert np.all(apart > 0.1)
    assert sorted(map(len, tops.values())) == [1, 1, 2, 2, 2, 3]
    boxes = [label.get_window_extent() for label in artists(figure, "kernel").values()]
    for index, box in enumerate(boxes):
        assert box.count_overlaps(boxes[:index]) == 0


def test_the_kinds_of_edges_differ_in_colour_and_in_line_style():
    kinds = [style for kind, style in EDGE_STYLES.items() if kind != Operator.LINEAR]
    assert len({style.color for style in kinds} | {DEAD_COLOR}) == 6
    assert len({style.line_style for style in kinds}) == 5
    assert EDGE_STYLES.keys() == set(Operator) - {Operator.ZERO}


def test_vertices_are_numbered_in_order_and_dead_ones_are_grey(graph):
    figure = draw_graph(graph)
    circles = artists(figure, "vertex")
    assert [*circles] == [(vertex,) for vertex in graph.nodes]
    for (vertex,), circle in circles.items():
        assert circle.center == (vertex, 0)
        grey = hex_color(circle.get_edgecolor()) == DEAD_COLOR
        assert grey == (not live_vertices(graph)[vertex])
    texts = [text.get_text() for text in figure.axes[0].texts]
    for text in ("input", "output", *map(str, graph.nodes)):
        assert texts.count(text) == 1


def test_kernel_sizes_stand_on_the_edges_that_have_one(graph):
    labels = artists(draw_graph(graph), "kernel")
    assert {pair: label.get_text() for pair, label in labels.items()} == {
        pair: f"{kernel}×{kernel}"
        for pair, operator, kernel, _ in edge_rows(graph)
        if operator in (Operator.CONV, Operator.AVG_POOL)
    }


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("two", ["linear"]),
        ("five", ["linear", "skip"]),
        ("cell", ["convolution", "skip", "average pooling"]),
        ("dead", ["linear", "skip", "on no path"]),
        ("mixed", ["linear, convolution", "skip", "average pooling"]),
        ("joins", ["linear", "concatenation", "product"]),
    ],
)
def test_the_legend_names_what_is_there(name, texts):
    assert legend_texts(draw_graph(GRAPHS[name])) == texts


def test_nothing_overlaps_in_a_cell():
    figure = draw_graph(cell_graph("3_34_333"))
    boxes = [
        artist.get_window_extent()
        for artist in (*artists(figure, "kernel").values(), *artists(figure, "vertex").values())
    ]
    assert len(boxes) == 10
    for index, box in enumerate(boxes):
        assert box.count_overlaps(boxes[:index]) == 0


@pytest.mark.parametrize(("name", "suffix"), [("five", ".png"), ("cell", ".PNG")])
def test_png_files(tmp_path, name, suffix):
    path = tmp_path / "new" / f"graph{suffix}"
    draw_graph(GRAPHS[name], path, title="A title")
    assert path.read_bytes().startswith(PNG_SIGNATURE)
    assert [*path.parent.iterdir()] == [path]
    image = matplotlib.image.imread(path, format="png")
    assert image.std() > 0.01


@pytest.mark.parametrize("name", ["five", "cell", "dead", "mixed", "parallel"])
def test_svg_files_hold_every_edge_and_the_texts(tmp_path, name):
    graph = GRAPHS[name]
    path = tmp_path / "graph.svg"
    figure = draw_graph(graph, str(path), title="A title")
    text = path.read_text(encoding="utf-8")
    root = xml.etree.ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    names = {element.get("id") for element in root.iter()}
    assert names >= {"edge-" + "-".join(map(str, pair)) for pair, *_ in edge_rows(graph)}
    for expected in (*legend_texts(figure), "input", "output", "A title"):
        assert f"<!-- {expected} -->" in text
    assert [*tmp_path.iterdir()] == [path]


def test_an_existing_file_is_replaced(tmp_path):
    path = tmp_path / "graph.png"
    path.write_bytes(b"old")
    draw_graph(GRAPHS["two"], path)
    assert path.read_bytes().startswith(PNG_SIGNATURE)


@pytest.mark.parametrize("name", ["graph.pdf", "graph", "graph.png.gz", ".png"])
def test_other_suffixes_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=rf"{re.escape(name)}'; accepted suffixes are .png, .svg"):
        draw_graph(GRAPHS["two"], tmp_path / name)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_no_half_file(tmp_path, monkeypatch, old, error):
    def savefig(figure, target, **options):
        target.write_bytes(PNG_SIGNATURE)
        raise error

    path = tmp_path / "graph.png"
    if old is not None:
        path.write_bytes(old)
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    with pytest.raises(type(error)):
        draw_graph(GRAPHS["two"], path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([] if old is None else [old])


def test_graphs_that_are_too_large_or_bad_are_refused(tmp_path):
    path = tmp_path / "graph.png"
    large = dag_graph(chain_string(MAX_VERTICES))
    with pytest.raises(ValueError, match=f"{MAX_VERTICES + 1} vertices .*at most {MAX_VERTICES}"):
        draw_graph(large, path)
    bad = GRAPHS["five"]._replace(edges={**GRAPHS["five"].edges, "operator": np.zeros(8, np.int32)})
    with pytest.raises(ValueError, match="unknown operator 0"):
        draw_graph(bad, path)
    assert not path.exists()


def test_drawing_in_given_axes(tmp_path):
    figure = matplotlib.figure.Figure(figsize=(6, 6))
    upper, lower = (figure.add_subfigure(row).add_subplot() for row in figure.add_gridspec(2, 1))
    path = tmp_path / "both.png"
    assert draw_graph(GRAPHS["five"], ax=upper) is figure
    assert draw_graph(GRAPHS["cell"], path, title="cell", ax=lower) is figure
    assert path.read_bytes().startswith(PNG_SIGNATURE)
    assert [axes.get_title() for axes in figure.axes] == ["", "cell"]
    assert [len(legend_texts(figure, index)) for index in (0, 1)] == [2, 3]


def test_lines_get_thinner_where_the_axes_are_small():
    small = matplotlib.figure.Figure(figsize=(2, 2)).add_subplot()
    widths = [
        artists(figure, "edge")[0, 1].get_linewidth()
        for figure in (draw_graph(GRAPHS["five"], ax=small), draw_graph(GRAPHS["five"]))
    ]
    assert widths[0] < widths[1]


def test_axes_that_were_removed_are_refused():
    axes = matplotlib.figure.Figure().add_subplot()
    axes.remove()
    with pytest.raises(ValueError, match="ax belongs to no figure"):
        draw_graph(GRAPHS["two"], ax=axes)


def test_drawing_leaves_pyplot_and_its_settings_alone(tmp_path):
    figures, settings = pyplot.get_fignums(), dict(matplotlib.rcParams)
    draw_graph(GRAPHS["five"], tmp_path / "graph.svg")
    assert pyplot.get_fignums() == figures
    assert dict(matplotlib.rcParams) == settings


def test_threads_draw_the_same_pictures_as_one(tmp_path):
    def pixels(task):
        name, folder = task
        path = tmp_path / folder / f"{name}.png"
        draw_graph(GRAPHS[name], path)
        return path.read_bytes()

    names = ["two", "five", "cell", "dead", "mixed"] * 2
    alone = [pixels((name, "alone")) for name in names]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        tasks = [(name, f"thread-{index}") for index, name in enumerate(names)]
        assert [*pool.map(pixels, tasks)] == alone
