"""The checker of the shape-checked pass: beartype that reads ``float`` as PEP 484 and mypy do, an int being welcome."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
