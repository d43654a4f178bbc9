"""What kernels took on a device, as data: tables in JSON, and the order of kernels that follows from them.

A table belongs to a target, and has an entry for each bucket of calls that was measured there: what every kernel took
that ran. `attncompiler bench … --save` writes it. Those in `tables/`, which come with the package, count wherever a
plan is made; a user's own, in the application's data folder, count on the machine at hand alone.
"""

from attncompiler.measured.order import LAST, Order, ordered, walked
from attncompiler.measured.store import entries, save
from attncompiler.measured.table import Bucket, Entry, Run, Table, Times

__all__ = ["LAST", "Bucket", "Entry", "Order", "Run", "Table", "Times", "entries", "ordered", "save", "walked"]
