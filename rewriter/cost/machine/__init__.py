"""Devices: seconds of a cost, by datasheet or by a measurement of this machine."""

from rewriter.cost.machine import calibrate, datasheets
from rewriter.cost.machine.device import Device, Level

__all__ = ["Device", "Level", "calibrate", "datasheets"]
