"""The tables of the documentation are what the code says."""

from __future__ import annotations

import re

import pytest

from daft_domainbed import plugin
from daft_domainbed.host import contract
from daft_domainbed.hparams import Hparam, is_text, pick
from daft_domainbed.methods import METHODS, Method, Slot, ask_for_slots
from daft_domainbed.plugin.defaults import list_hparams
from tools import pages


@pytest.fixture(autouse=True)
def host() -> contract.Host:
    host = contract.find_host()
    plugin.register(host)
    return host


def read_rows(table: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    return {name.strip("`"): cells for name, *cells in rows}


def test_page_is_what_the_rows_say() -> None:
    page = pages.PAGE.read_text(encoding="utf-8")
    assert pages.fill_page(page) == page, "make pages"
    assert pages.fill_page(page.replace("| 0.9 |", "| 0.8 |")) == page


def test_every_hyperparameter_has_a_row(host: contract.Host) -> None:
    rows = read_rows(pages.make_table(host))
    assert rows.keys() == {name for method in METHODS for name in list_hparams(method, ask_for_slots(method))}
    assert rows["natural"][0] == "PIAT (piat_static)"
    assert rows["aft_steps"][0] == "KD (kd_match) DAFT"
    assert rows["kd_weight"][:3] == ["KD DAFT", "0.9", "`U[0.5, 1]`"]
    assert rows["backbone"][:3] == ["all but AFT CaRot FAAL", "EmojiStyles: `resnet8_w8`, PACS: `default`", "fixed"]
    assert rows["input_size"][:2] == ["all", "224"]
    assert re.fullmatch("EmojiStyles: `resnet8_w32`, PACS: `resnet50`", rows["teacher_backbone"][1])


def test_a_new_method_has_its_rows(host: contract.Host, monkeypatch: pytest.MonkeyPatch) -> None:
    hparams = {"duo_kind": Hparam("a|b", is_text, "one | or the other", pick("a|b", "b"))}
    monkeypatch.setitem(METHODS, "Duo", Method(slots=(Slot(None, "sight"),), mixin=object, hparams=hparams))
    rows = read_rows(pages.make_table(host))
    assert rows["duo_kind"] == ["Duo", "`a&#124;b`", "`{a&#124;b, b}`", "one &#124; or the other"]
    assert rows["sight"][-1].endswith("or `auto`: `sight_backbone` with `sight_weights`")
