"""Preparation before any device is changed: keys for all hosts, and signed bundles of one model."""

from pathlib import Path, PurePosixPath

from common.names import check_host
from testbed.errors import FleetError
from testbed.fleet.ansible import Inventory
from testbed.fleet.files import needed_files
from testbed.keys.authority import hosts_of
from testbed.keys.folder import KeyFolder, create
from testbed.keys.mosquitto import HOME_ASSISTANT
from testbed.keys.validity import CERTIFICATE_DAYS
from wire.errors import SignatureError
from wire.experts import UnitId, parse_selector, unit_name
from wire.manifest import MANIFEST_NAME, load_manifest
from wire.signature import check_signature, sign

BROKER_FOLDER = PurePosixPath("/etc/mosquitto/wdmoe")


def prepare_keys(inventory: Inventory, *, check: bool = False) -> list[str]:
    """Make missing keys for the broker, the base station and the nodes.

    Args:
        check: make no keys, only report.

    Returns:
        Lines that say which keys were made, or with `check` would be made.

    Raises:
        FleetError: the broker's certificate is for another address.
        KeyFileError: the folder is not a folder of keys.
        StorageError: the folder can't be written.
    """
    folder, address = _keys_folder(inventory), inventory.address()
    if not folder.exists() and check:
        return [f"would make keys of a new cluster in {folder}"]
    prefix = inventory.home_assistant()
    if not folder.exists():
        create(
            folder, cluster=inventory.cluster, hosts=[address], nodes=inventory.nodes,
            days=CERTIFICATE_DAYS, port=inventory.broker_port(),
            broker_folder=BROKER_FOLDER,
        )  # fmt: skip
        made = [f"made keys of a new cluster in {folder}: keep this folder, no other can add devices to the cluster"]
        return made + _admit_home_assistant(KeyFolder(folder), prefix, check=False)
    keys = KeyFolder(folder)
    known = hosts_of((folder / "broker" / "broker.crt").read_bytes())
    if check_host(address) not in known:
        raise FleetError(
            f"the broker's certificate in {folder} is for {', '.join(known)}, but nodes connect to {address}: "
            "set wdmoe_address, or set wdmoe_keys to another folder"
        )
    new = [node for node in inventory.nodes if node not in keys.nodes]
    if not check:
        keys.add(new, days=CERTIFICATE_DAYS)
    lines = [f"{'would make' if check else 'made'} keys for {', '.join(new)} in {folder}"] if new else []
    return lines + _admit_home_assistant(keys, prefix, check=check)


def _admit_home_assistant(keys: KeyFolder, prefix: str | None, *, check: bool) -> list[str]:
    if prefix is None or keys.home_assistant == prefix:
        return []
    if not check:
        keys.admit_home_assistant(prefix, days=CERTIFICATE_DAYS)
    return [f"{'would make' if check else 'made'} keys for Home Assistant in {keys.path / HOME_ASSISTANT}"]


def prepare_bundles(inventory: Inventory, *, check: bool = False) -> list[str]:
    """Check that all bundles are of one model and contain what the inventory asks for; sign unsigned ones.

    Args:
        check: sign no bundle, only report.

    Returns:
        Lines that say which bundles were signed, or with `check` would be signed, and how many experts no node holds.

    Raises:
        FleetError: a host has no bundle or no experts, or the bundles are of different models or slices.
        BundleError: a folder is not a bundle, or a bundle lacks an expert.
    """
    keys, lines = _keys_folder(inventory), []
    models: dict[str, str] = {}
    missing: set[UnitId] = set()
    slices = 1  # the base station comes first
    for host in (inventory.base_station, *inventory.nodes):
        bundle = inventory.path(host, "wdmoe_bundle")
        experts = inventory.variables.get(host, {}).get("wdmoe_experts")
        node = host in inventory.nodes
        if bundle is None:
            raise FleetError(f"{host} has no wdmoe_bundle: set it to the folder that 'wdmoe-export bundle' made")
        if node and not isinstance(experts, str):
            raise FleetError(
                f"{host} has no wdmoe_experts: set it to a selector such as 'L*:E0-1' ('wdmoe-bs place' suggests one)"
            )
        try:
            needed = needed_files(bundle, experts=experts if node else None, trunk=not node)
        except ValueError as error:
            raise FleetError(f"{host}: wdmoe_experts: {error}") from None
        models.setdefault(needed.model_sha256, host)
        manifest = load_manifest(bundle)
        dims = manifest.dims
        if node:
            missing -= set(parse_selector(str(experts), layers=dims.layers, experts=dims.experts, slices=dims.slices))
        else:
            missing = set(parse_selector("L*:E*", layers=dims.layers, experts=dims.experts, slices=dims.slices))
            slices = dims.slices
        if dims.slices != slices:
            raise FleetError(f"{host}'s bundle has experts in {dims.slices} slices, the base station's in {slices}")
        if not _signed(bundle, keys):
            if not check:
                sign((bundle / MANIFEST_NAME).read_bytes(), bundle, keys / "bundle.key")
            lines.append(f"{'would sign' if check else 'signed'} {bundle} with the cluster's key")
    if len(models) > 1:
        raise FleetError(f"the bundles of {' and '.join(models.values())} are of different models")
    if missing:
        noun = "experts" if slices == 1 else "slices"
        lines.append(
            f"no node holds {len(missing)} {noun}, such as {unit_name(min(missing), slices)}: answers will be degraded"
        )
    return lines


def _keys_folder(inventory: Inventory) -> Path:
    return inventory.path(inventory.base_station, "wdmoe_keys") or inventory.folder / "keys"


def _signed(bundle: Path, keys: Path) -> bool:
    if not keys.exists():
        return False
    try:
        check_signature((bundle / MANIFEST_NAME).read_bytes(), bundle, keys / "bs" / "bundle.pub")
    except SignatureError:
        return False
    return True
