"""Pages about runs, made from the files in their directories, never from live objects.

run_files         the files of a run, as far as they can be read
task              the words of a task
run_page          one run → sections of its page
comparison_page   several runs → sections of one page
verdict           whether a run is better than its base, in a sentence
run_list          the runs of a folder, listed or ranked, for a terminal
*_section         parts of a run's page: result, curves, plan, data, samples
blocks            what a page is made of
charts            numbers → inline SVG
html              sections → one self-contained HTML file
units             numbers with their units, in words
word_diff         the words in which an answer differs from its reference
run_diff          what two runs differ in, for `loratune diff`
model_card        the model card of an adapter
"""
