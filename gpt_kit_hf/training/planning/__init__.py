"""Plans: which model to train on a text, for how long and at which rates, so that it takes what it may take.

`corpus_facts` measures the text, `candidates` times shapes on this machine, `law` says how good they become, `choice`
chooses among them, `plan` makes the options of the run, `page` prints the plan and writes its options.
"""
