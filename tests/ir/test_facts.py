"""The table of facts: typed, immutable, about sites and about the whole network."""

import pytest

from hawqfx.errors import PassError
from hawqfx.ir.facts import NETWORK, Account, ByteCost, ChosenFormat, FactTable
from hawqfx.maths.formats import Format


def test_facts_are_typed_and_immutable() -> None:
    table = FactTable().with_facts({"a": ChosenFormat(Format(4), 0.0)})
    more = table.with_facts({"a": ByteCost({Format(4): 2})})
    assert (table.has("a", ByteCost), more.has("a", ByteCost), more.get("a", ChosenFormat).format.bits) == (
        False,
        True,
        4,
    )
    with pytest.raises(PassError, match="nothing is known about the ByteCost of 'b'"):
        more.get("b", ByteCost)


def test_facts_about_the_network_have_a_key_of_their_own() -> None:
    account = Account({}, 1.0, 0.5, False)
    table = FactTable().with_facts({NETWORK: account, "a": ByteCost({Format(4): 2})})
    assert table.get(NETWORK, Account) is account
    assert not table.has("a", Account)
    with pytest.raises(PassError, match="nothing is known about the ByteCost of the network"):
        table.get(NETWORK, ByteCost)
