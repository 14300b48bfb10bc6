"""What a model is evaluated on, and what sparse attention changes in its answers.

text, content -> families -> tasks
                              generated tasks: ordinary text, what is hidden in it and asked, instances and their scores
replay -> accuracy -> report  many settings answer the same instances; rows of each; tables and summaries of rows
selections                    which blocks successive steps select: traces, overlap, working sets
longbench -> scorers          LongBench's prompts, predictions and official scores
"""
