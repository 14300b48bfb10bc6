"""Pictures of results, in one style. Needs matplotlib (`pip install '.[eval]'`).

style -> accuracy, ladder, benchmarks, requests, selections   each draws rows that an experiment has written
style -> inside                                               draws what `evaluation.inside` tells, on axes given
folder                                                        finds out what a folder of results holds, and draws it
"""
