"""What a model is evaluated on, and what sparse attention changes in its answers.

replay -> accuracy -> report  many settings answer the same instances; rows of each; tables and summaries of rows
selections                    which blocks successive steps select: traces, overlap, working sets
longbench -> scorers          LongBench's prompts, predictions and official scores
"""
