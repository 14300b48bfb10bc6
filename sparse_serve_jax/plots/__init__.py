"""Pictures of results, in one style. Needs matplotlib (`pip install '.[eval]'`).

style -> accuracy, ladder, benchmarks, requests   each draws rows that an experiment has written
style -> inside                                   draws what `evaluation.inside` tells, on axes that are given
folder                                            finds out what a folder of results holds, and draws it
"""
