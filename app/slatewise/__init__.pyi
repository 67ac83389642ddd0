from slatewise.client.async_client import AsyncClient as AsyncClient
from slatewise.client.client import Client as Client
from slatewise.client.errors import SlatewiseError as SlatewiseError
from slatewise.client.results import Ranking as Ranking
from slatewise.local.ranker import LocalRanker as LocalRanker
from slatewise.local.ranker import load as load

VERSION: str
