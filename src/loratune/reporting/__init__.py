"""What people read of a run: it reads the run directory's files, never live objects.

card        the model card of an adapter
files       a run's files, as far as they can be read
blocks      what a page is made of
charts      numbers → inline SVG
words       two texts → where their words differ
answers     held-out prompts → answers side by side
sections    parts of a page, each by itself
single      one run → sections of a page
comparison  several runs → sections of a page
page        sections → one self-contained HTML file
"""
