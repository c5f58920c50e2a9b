"""Writes the report pages of a few networks, and screenshots of them; `make report`.

    python -m tests.report.pictures [--out FOLDER]

The networks are the ResNet-20 of the zoo, a small BERT, and a made-up chain of 1,000 nodes.  Look at the screenshots
after a change of the page: no test sees what is ugly.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import hawqfx
from hawqfx import zoo
from hawqfx.report.page import page
from tests.report.browser import CHROMIUM, Tab, chromium
from tests.report.made_up import chain

PHONE = {"width": 390, "height": 844}
TOP = {"width": 1100, "height": 1340}  # to the strip of bits: docs/report.png


def resnet(path: Path) -> None:
    """The demo's network, timed too."""
    budget = "size=12.5%, latency=100%"
    hawqfx.compile(zoo.resnet20(), budget, zoo.calibration()[:2], sensitivity="gauss-newton").report(path)


def bert(path: Path) -> None:
    """A transformer of two layers with random weights."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=200, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    model = BertForSequenceClassification(config).eval()
    data = [({"input_ids": torch.randint(0, 200, (8, 16))}, torch.randint(0, 2, (8,))) for _ in range(2)]
    hawqfx.compile(model, "weight_bits=5", data, sensitivity="gauss-newton").report(path, points=10)


def thousand(path: Path) -> None:
    """A long chain, of facts that are made up."""
    path.write_text(page(chain(1000)), encoding="utf-8")


NETWORKS: dict[str, Callable[[Path], None]] = {"resnet20": resnet, "bert": bert, "thousand": thousand}


def shots(browser: Any, written: Path) -> Iterator[Path]:
    """Pictures beside a page: the whole of it in light, in dark and on a phone, its top, a node clicked, and paper."""

    def whole(tab: Tab, name: str, *, full_page: bool = True) -> Path:
        path = written.with_name(f"{written.stem}-{name}.png")
        tab.page.screenshot(path=path, full_page=full_page)
        return path

    for theme in ("light", "dark"):
        yield whole(Tab(browser, written, color_scheme=theme), theme)
    yield whole(Tab(browser, written, viewport=PHONE), "phone")
    yield whole(Tab(browser, written, viewport=TOP), "top", full_page=False)
    tab = Tab(browser, written)
    middle = tab.page.evaluate("(() => { const all = graph.cy.nodes(); return all[all.length >> 1].id(); })()")
    tab.tap(middle)
    path = written.with_name(f"{written.stem}-clicked.png")
    tab.page.screenshot(path=path)
    yield path
    path = written.with_name(f"{written.stem}-print.pdf")
    tab.page.pdf(path=path, format="A4", print_background=True)
    yield path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/report"), help="the folder of pages and screenshots")
    parser.add_argument("--only", choices=NETWORKS, nargs="*", default=NETWORKS, help="the networks")
    options = parser.parse_args()
    if not CHROMIUM:
        raise SystemExit("there is no Chromium: apt-get install chromium")
    options.out.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        for name in options.only:
            path = options.out.resolve() / f"{name}.html"
            NETWORKS[name](path)
            print(path)
            for shot in shots(browser, path):
                print(f"  {shot.name}")


if __name__ == "__main__":
    main()
