"""Requests, scheduling, execution: everything above a step."""
