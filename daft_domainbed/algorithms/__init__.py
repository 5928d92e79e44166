"""The algorithms, as mixins over a host's ERM; `plugin.register` makes the classes."""

from daft_domainbed.algorithms.aft import AFT
from daft_domainbed.algorithms.daft import DAFT, KD
from daft_domainbed.algorithms.sma import SMA

MIXINS: dict[str, type] = {"AFT": AFT, "KD": KD, "DAFT": DAFT, "SMA": SMA}
