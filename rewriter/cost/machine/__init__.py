"""Devices: seconds of a cost, by datasheet or by a measurement of this machine."""
