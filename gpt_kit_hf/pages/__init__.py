"""Web pages of this machine, for a look at models and runs.

`server` is what every page is served by: loopback only, files of this package only. `watch` is the page of the curves
of runs, live; `curve_rows` makes curves short enough for it. `static/curves.js` draws them. `report` writes
what is known of a run into one file: `report_facts` what its folder has, `report_tokens` a text by token.

`play` is the page of models: its requests and answers. `models` are those that it can choose among, `views` what it
shows of a text, `chat` of a conversation; `work` is the thread that computes.
"""
