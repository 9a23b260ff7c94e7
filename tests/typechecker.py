"""What checks annotations in the test run: beartype, with an int accepted where a float is wanted, as Python's own
rules say.
"""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
