"""Files and folders: what may be written where, writing that is never half-written, JSON, and locks.

outputs.py      claim: decides whether an output may be written
new.py          new_folder, new_file, write_bytes: a temporary name, flushed, then moved into place
temporary.py    temporary names beside an output; those of dead runs are recognised and removed
moves.py        renames that replace nothing, or swap two folders in one step
own.py          folders that this library wrote, and the SHA-256 of their files
locks.py        one run at a time in a folder that is written step by step
sizes.py        bytes in words
json_files.py   JSON objects, and names that may not leave their folder
"""

from .json_files import inside as inside
from .json_files import read_json as read_json
from .json_files import to_json as to_json
from .locks import locked as locked
from .new import new_file as new_file
from .new import new_folder as new_folder
from .new import write_bytes as write_bytes
from .new import write_json as write_json
from .new import write_text as write_text
from .outputs import Claim as Claim
from .outputs import Target as Target
from .outputs import check_space as check_space
from .outputs import claim as claim
from .outputs import claim_file as claim_file
from .own import VERSION as VERSION
from .own import changed_files as changed_files
from .own import damage as damage
from .own import not_ours as not_ours
from .own import record as record
from .own import seal as seal
from .own import sha256 as sha256
from .sizes import human as human
from .temporary import remove as remove
from .temporary import sweep as sweep
