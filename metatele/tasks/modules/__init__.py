"""Small inner problems on modules of any kind, as people have them; all data are synthetic.

What a table, an image or a sequence is like is a source (:mod:`tables <metatele.tasks.modules.tables>`, ``images``,
``sequences``); what reads it a network (``networks``). Which sources there are is a table (``kinds``). A problem joins
them with a way of training (``problem``), and the distribution draws all three.
"""

from metatele.tasks.modules.data import Data, Source
from metatele.tasks.modules.distribution import Modules
from metatele.tasks.modules.draws import Draws
from metatele.tasks.modules.kinds import Kind, register_kind
from metatele.tasks.modules.networks import Network, built
from metatele.tasks.modules.problem import CHANGES, Problem

__all__ = ["CHANGES", "Data", "Draws", "Kind", "Modules", "Network", "Problem", "Source", "built", "register_kind"]
