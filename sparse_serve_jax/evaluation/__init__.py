"""What a model is evaluated on, and what sparse attention changes in its answers.

replay -> accuracy -> report  many settings answer the same instances; rows of each; tables and summaries of rows
selections                    which blocks successive steps select: traces, overlap, working sets
study                         rows of accuracy and selections in a folder; those that are there are not measured again
inside                        what a serving engine selects, holds in slots and leaves out, step by step
longbench -> scorers          LongBench's prompts, predictions and official scores
"""
