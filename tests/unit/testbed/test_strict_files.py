"""Plans, networks, inventories, radio settings and evaluation items: what is ambiguous or out of range is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.errors import WdmoeError
from testbed.evaluation.data_sets import BlankItem, ChoiceItem, DomainText, LastWordItem, read_items
from testbed.fleet.ansible import read_inventory
from testbed.network.spec import read_spec
from testbed.plan.reading import read_plan
from testbed.radio.setting import read_setting
from testbed.yaml_files import check_yaml

_PLAN = "name: t\npolicies: [topk]\nworkloads:\n- {kind: generate}\n"
_NETWORK = "name: t\nprofiles:\n  near:\n    default: {}\n"
_INVENTORY = "all:\n  children:\n    base_station: {hosts: {box: {}}}\n    nodes:\n      hosts: {pi1: {}}\n"
_ITEM = '{"question": "q", "choices": ["a", "b"], "label": 1}\n'


_BLANK = '{"question": "She said _ left.", "choices": ["Ann", "Bea"], "label": 0}\n'


def _blanks(path: Path) -> list[BlankItem]:
    return read_items(path, BlankItem)


def _last_words(path: Path) -> list[LastWordItem]:
    return read_items(path, LastWordItem)


def _texts(path: Path) -> list[DomainText]:
    return read_items(path, DomainText)


def _laughs(of: str, first: str) -> str:
    """A few lines that expand to billions: each refers nine times to the one before."""
    lines = [f"a{i}: &a{i} {of.format(','.join([f'*a{i - 1}'] * 9))}\n" for i in range(1, 12)]
    return f"a0: &a0 {first}\n{''.join(lines)}"


def _items(path: Path) -> list[ChoiceItem]:
    return read_items(path, ChoiceItem)


@pytest.mark.parametrize(
    ("read", "text", "reason"),
    [
        (read_plan, _PLAN + "seed: 1\nname: u\n", r"line 6: 'name' is given twice \(first in line 1\)"),
        (read_plan, _PLAN + "limits: {most_celsius: .inf}\n", "line 5: most_celsius: .inf is not a finite number"),
        (read_plan, _PLAN + "settle_s: .nan\n", "line 5: settle_s: .nan is not a finite number"),
        (read_plan, _PLAN + "settle_s: 1.0e+999\n", "not a finite number"),
        (read_plan, _PLAN + "settle_s: 1.0e+99\n", "line 5: Expected `float` <= "),
        (read_plan, _PLAN + f"seed: {'7' * 5000}\n", "line 5: seed: a number of 5000 characters"),
        (read_plan, _PLAN + "seed: -1\n", "line 5: Expected `int` >= 0"),
        (read_plan, _PLAN + "- {kind: generate}\n", "workloads: 'generate' is listed twice"),
        (read_plan, _PLAN.replace("{kind: generate}", "{kind: generate, seed: 1, seed: 2}"), "line 4: 'seed'"),
        (read_plan, _PLAN + "seed: 010\n", "line 5: seed: 010 means 8 in YAML: write 8"),
        (read_plan, _PLAN + "settle_s: 1:30\n", "line 5: settle_s: 1:30 means 90 in YAML"),
        (read_plan, _PLAN + "seed: 1e3\n", "line 5: Expected `int`, got `str`"),
        (read_plan, _PLAN + "baseline: off\n", "line 5: Expected `str . null`, got `bool`"),
        (read_plan, _PLAN + "profiles: !!set {a, b}\n", "line 5: the tag .*:set has no meaning here"),
        (read_plan, _PLAN + "profiles: [!!python/object/apply:os.system [id]]\n", "line 5: the tag .*os.system has no"),
        (read_plan, _PLAN + "profiles: [!vault a]\n", "line 5: the tag !vault has no meaning"),
        (read_plan, _PLAN + "<<: &a {seed: 3, <<: *a}\n", "line 5: it refers to itself"),
        (read_plan, _PLAN + "more: &m\n- *m\n", "line 5: it refers to itself"),
        (read_plan, _PLAN + _laughs("{{<<: [{}]}}", "{x: y}"), "expand to more than 1048576 values"),
        (read_plan, _PLAN + _laughs("[{}]", "[lol]"), "expand to more than 1048576 values"),
        (read_plan, _PLAN + "#" * (1 << 20), "bytes, at most 1048576 are possible"),
        (read_plan, _PLAN + "---\nname: u\n", "line 5: not YAML: but found another document"),
        (read_plan, _PLAN + "\tseed: 1\n", "line 5: not YAML"),
        (read_plan, _PLAN + "nodes: {pi: 'L*:E*', Pi: 'L*:E*'}\n", "nodes: 'Pi' is listed twice"),
        (
            read_plan,
            _PLAN + "- {kind: generate, name: Generate}\n",
            r"workloads: 'Generate' is listed twice \(upper and lower",
        ),
        (read_plan, "[" * 3000, "not YAML|nested"),
        (read_plan, "a: &a [*a]\n" + _PLAN, "line|unknown field"),
        (read_plan, "\x00", "not YAML"),
        (read_spec, _NETWORK + "  near: {}\n", "line 5: 'near' is given twice"),
        (read_spec, _NETWORK.replace("{}", "{down_mbps: .inf}"), "line 4: down_mbps: .inf"),
        (read_spec, _NETWORK.replace("{}", "{down_mbps: 5000}"), "line 4: Expected `float` <= 1000"),
        (
            read_spec,
            _NETWORK.replace("{}", "{down_mbps: 5}") + "  far:\n    default: {down_mbps: 0}\n",
            "Expected `float` > 0",
        ),
        (read_spec, _NETWORK + "nodes: [a, a]\n", "'a' is listed twice"),
        (read_spec, _NETWORK + "nodes: [a, A]\n", "'A' is listed twice"),
        (read_spec, _NETWORK + "  Near: {}\n", "profiles: 'Near' is listed twice"),
        (read_spec, _NETWORK + "nodes: 0o10\n", "line 5: Expected"),
        (read_spec, _NETWORK + "queue_ms: 1:30.5\n", "line 5: queue_ms: 1:30.5 means 90.5"),
        (read_spec, _NETWORK + "subnet: 127.0.0.0/24\n", "subnet: .* no link can have"),
        (read_spec, _NETWORK + "subnet: 224.0.0.0/16\n", "subnet: .* no link can have"),
        (read_spec, _NETWORK + "subnet: 0.0.0.0/0\n", "subnet: .* no link can have"),
        (read_setting, "noise_dbm_hz: .nan\n", "line 1: noise_dbm_hz: .nan"),
        (read_setting, "hidden: 4\nhidden: 5\n", "line 2: 'hidden' is given twice"),
        (read_inventory, _INVENTORY + "        pi1: {}\n      hosts: {pi2: {}}\n", "line"),
        (read_inventory, _INVENTORY.replace("{pi1: {}}", "{pi1: {}, pi1: {}}"), "line 5: 'pi1' is given twice"),
        (
            read_inventory,
            _INVENTORY.replace("pi1: {}", "pi1: {wdmoe_memory_max: .inf}"),
            "line 5: wdmoe_memory_max: .inf",
        ),
        (_items, _ITEM + '{"question": "q", "choices": ["a", "b"], "label": 2}\n', "line 2: label 2 is none of the 2"),
        (_items, _ITEM.replace('"label": 1', '"label": -1'), "line 1: label -1"),
        (_items, _ITEM.replace('"label": 1', '"label": 0, "label": 1'), "line 1: 'label' is given twice"),
        (_items, _ITEM.replace('"label": 1', '"label": NaN'), "line 1: NaN is not a finite number"),
        (_items, _ITEM.replace('["a", "b"]', "[]"), "line 1: "),
        (_blanks, _BLANK + _ITEM, "line 2: the question needs one blank '_' with text after it: 'q'"),
        (_blanks, _BLANK.replace("She", "_"), "line 1: the question needs one blank"),
        (_blanks, _BLANK.replace(" left.", ""), "line 1: the question needs one blank"),
        (_blanks, _BLANK.replace('"label": 0', '"label": 2'), "line 1: label 2 is none of the 2"),
        (_last_words, '{"text": "two words"}\n{"text": "one"}\n', "line 2: the text needs a last word after a space"),
        (_last_words, '{"text": " word"}\n', "line 1: the text needs a last word"),
        (_last_words, '{"text": "ends with "}\n', "line 1: the text needs a last word"),
        (_items, _ITEM.replace('"q"', '"  "'), "line 1: the question is empty"),
        (_items, _ITEM.replace('"a"', '"\\ud83d"'), "line 1: a text has half of a surrogate pair"),
        (_items, _ITEM.replace("}", ', "more": 1e999}'), "line 1: 1e999 is not a finite number"),
        (_items, _ITEM.replace("}", f', "more": {"9" * 5000}}}'), "line 1: a number of 5000 digits"),
        (_items, _ITEM.replace('"label": 1', '"label": true'), "line 1: Expected `int`, got `bool`"),
        (_items, _ITEM.replace('"label": 1', '"label": 1.0'), "line 1: Expected `int`, got `float`"),
        (_texts, '{"domain": "d", "text": " "}\n', "line 1: the text is empty"),
        (_items, _ITEM + "[" * 100_000 + "\n", "line 2: "),
        (_items, _ITEM + '{"question": "\xff"}\n', "line 2: "),
    ],
)
def test_mistakes_are_refused_with_file_and_line(
    read: Callable[[Path], Any], text: str, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "file.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(WdmoeError, match=reason) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_valid_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "items"
    path.write_text(_ITEM)
    assert _items(path) == [ChoiceItem("q", ["a", "b"], 1)]
    path.write_text('{"domain": "d", "text": "t", "more": 1}\n')
    assert read_items(path, DomainText) == [DomainText("d", "t")]
    check_yaml(b"a: &x {b: 1, c: 0x1F}\nd: {<<: *x, b: 2}\ne: [*x, *x, 1_000, .5, 'nan']\nf: !vault text\n")
    check_yaml(b"")
    check_yaml(b"mode: 0644\nat: 12:30\nkey: !vault text\n")  # other programs have their own rules
    path.write_text('{"question": "\\ud83d\\ude00 \\\\ud83d", "choices": ["a"], "label": 0}\n')
    assert _items(path)[0].question == "😀 \\ud83d"
