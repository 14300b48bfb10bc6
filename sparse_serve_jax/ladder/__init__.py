"""The papers' ladder: configurations that add one idea each, measured side by side.

rungs             configurations that can be compared, within the same memory
cells -> goodput  a rung at a rate of arrival; the highest rate that it serves well
floor             the least time that a cell's work takes at the device's own rates
folder, report    what is kept of cells, for a run that goes on and for simulations; tables of it
"""
